"""Emulated compute: stages that wait instead of computing, with real messages between them.

Waiting needs no core, so dozens of processes rehearse a schedule on a small machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class EmulatedStage:
    """Takes the given seconds for each kind of action and passes on messages of the right shape and type."""

    forward_s: float
    backward_s: float
    """Of a whole backward."""
    input_s: float
    weight_s: float
    message_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    _message: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._message = torch.zeros(self.message_shape, dtype=self.dtype)

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor:
        time.sleep(self.forward_s)
        return self._message

    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None:
        time.sleep(self.backward_s)
        return self._message

    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None:
        time.sleep(self.input_s)
        return self._message

    def backward_weight(self, micro_batch: int, *, last: bool) -> None:
        time.sleep(self.weight_s)
