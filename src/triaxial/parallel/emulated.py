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
    """Takes the given seconds for each kind of action and passes on messages of the right shape and type.

    A wait that ends late, as waits do, shortens the stage's next one: the mean is as given.
    """

    forward_s: float
    backward_s: float
    """Of a whole backward."""
    input_s: float
    weight_s: float
    message_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    _message: Tensor = field(init=False)
    _late_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._message = torch.zeros(self.message_shape, dtype=self.dtype)

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor:
        self._wait(self.forward_s)
        return self._message

    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None:
        self._wait(self.backward_s)
        return self._message

    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None:
        self._wait(self.input_s)
        return self._message

    def backward_weight(self, micro_batch: int, *, last: bool) -> None:
        self._wait(self.weight_s)

    def _wait(self, seconds: float) -> None:
        begin = time.perf_counter()
        time.sleep(max(0.0, seconds - self._late_s))
        self._late_s += time.perf_counter() - begin - seconds
