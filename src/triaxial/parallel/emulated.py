"""Emulated compute: stages that wait instead of computing, with real messages between them.

Waiting needs no core, so dozens of processes rehearse a schedule on a small machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from triaxial.parallel.data import Unit
from triaxial.parallel.mesh import Axis
from triaxial.parallel.stage import StageUnits


class Waits:
    """Waits that are as long as asked on average: one that ends late, as waits do, shortens the next."""

    def __init__(self) -> None:
        self._late_s = 0.0

    def wait(self, seconds: float) -> None:
        begin = time.perf_counter()
        time.sleep(max(0.0, seconds - self._late_s))
        self._late_s += time.perf_counter() - begin - seconds


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
    _waits: Waits = field(init=False, default_factory=Waits)

    def __post_init__(self) -> None:
        self._message = torch.zeros(self.message_shape, dtype=self.dtype)

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor:
        self._waits.wait(self.forward_s)
        return self._message

    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None:
        self._waits.wait(self.backward_s)
        return self._message

    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None:
        self._waits.wait(self.input_s)
        return self._message

    def backward_weight(self, micro_batch: int, *, last: bool) -> None:
        self._waits.wait(self.weight_s)


@dataclass(frozen=True)
class EmulatedBlock:
    """Waits in seconds, and elements of fp32 in the collectives over tensor-parallel ranks that follow them."""

    forward_s: float
    input_s: float
    weight_s: float
    forward_elements: int
    input_elements: int


class EmulatedBlocks:
    """A stage of blocks that wait, then communicate as real ones do: over the tensor-parallel axis in forward and
    backward, and over the data-parallel axes by their units.

    Attributes:
        spent_s: seconds in the collectives of actions so far, over `tp` and `dp`.
    """

    def __init__(
        self,
        blocks: Sequence[EmulatedBlock],
        units: Sequence[Sequence[Unit]],
        tp: Axis,
        *,
        sequence_parallel: bool,
        message_shape: tuple[int, ...],
    ) -> None:
        """`units` of each block."""
        self.spent_s = dict.fromkeys(("tp", "dp"), 0.0)
        self._blocks, self._units, self._tp = blocks, StageUnits(units), tp
        self._sequence_parallel = sequence_parallel
        self._message = torch.zeros(message_shape)
        self._waits = Waits()

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor:
        for place, block in enumerate(self._blocks):
            with self._timed("dp"):
                self._units.gather(place, 1)
            self._waits.wait(block.forward_s)
            self._communicate(block.forward_elements)
            self._units.release(place)
        return self._message

    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None:
        return self._backward(weights=True, last=last)

    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None:
        return self._backward(weights=False)

    def backward_weight(self, micro_batch: int, *, last: bool) -> None:
        for place in reversed(range(len(self._blocks))):
            self._weight(place, last)

    def _backward(self, *, weights: bool, last: bool = False) -> Tensor:
        for place in reversed(range(len(self._blocks))):
            with self._timed("dp"):
                self._units.gather(place, -1)
            self._waits.wait(self._blocks[place].input_s)
            self._communicate(self._blocks[place].input_elements)
            if weights:
                self._weight(place, last)
            self._units.release(place)
        return self._message

    def _weight(self, place: int, last: bool) -> None:
        with self._timed("dp"):
            self._units.open_backward(place)
        self._waits.wait(self._blocks[place].weight_s)
        with self._timed("dp"):
            self._units.close_backward(place, last)

    def _communicate(self, elements: int) -> None:
        if not elements:
            return
        with self._timed("tp"):
            x = torch.zeros(elements)
            if self._sequence_parallel:
                self._tp.all_gather(self._tp.reduce_scatter(x))
            else:
                self._tp.all_reduce(x)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.spent_s[what] += time.perf_counter() - begin
