"""`Stage`: one run of blocks on one rank, as the forward and backward work that a pipeline schedule orders.

Every block has a graph of its own: backward walks the blocks explicitly, which is where full recompute, ZeRO-3's
gathers and the gradient reductions find their place without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from triaxial.model.decoder import Attend, Block, Embedding, Head, Layer, Rotation
from triaxial.parallel.data import Unit
from triaxial.parallel.tensor import WeightGradients


class Work(Protocol):
    """What a pipeline runs for its actions; real stages and emulated ones both are this."""

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor: ...
    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None: ...
    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None: ...
    def backward_weight(self, micro_batch: int, *, last: bool) -> None: ...


@dataclass(frozen=True)
class MicroBatch:
    """ids and labels [tokens], sequence-major; the loss is the sum over labels times `loss_scale`."""

    ids: Tensor
    labels: Tensor
    loss_scale: Tensor


@dataclass(frozen=True)
class Placed:
    """A block with the units that hold its parameters."""

    block: Block
    units: tuple[Unit, ...]


@dataclass
class _Segment:
    """One block's graph of one micro-batch; without `output` (full recompute) it is built again in backward."""

    input: Tensor
    output: Tensor | None


class StageUnits:
    """The units of a stage's blocks as passes walk over them: gathered ahead, reduced behind."""

    def __init__(self, blocks: Sequence[Sequence[Unit]]) -> None:
        self._blocks = blocks
        self._reducing: Unit | None = None

    def gather(self, place: int, step: int) -> None:
        """Make a block's parameters whole, and start on the next block's while this one computes."""
        for unit in self._blocks[place]:
            unit.gather()
        if 0 <= place + step < len(self._blocks):
            for unit in self._blocks[place + step]:
                unit.start_gather()

    def release(self, place: int) -> None:
        for unit in self._blocks[place]:
            unit.release()

    def open_backward(self, place: int) -> None:
        for unit in self._blocks[place]:
            unit.open_backward()

    def close_backward(self, place: int, last: bool) -> None:
        """Start to reduce a block's gradients, and finish what was started for the block before."""
        for unit in self._blocks[place]:
            unit.close_backward(last=last)
            if unit.reduces_in_turn:
                if self._reducing is not None:
                    self._reducing.finish_reduce()
                self._reducing = unit


class Stage:
    """A run of blocks. `losses` collects the summed loss of each micro-batch on the stage that has the head."""

    def __init__(
        self,
        blocks: Sequence[Placed],
        gradients: WeightGradients,
        rotation: Rotation,
        attends: Callable[[int], Attend],
        *,
        recompute: bool,
    ) -> None:
        self.blocks = blocks
        self.micro_batches: Sequence[MicroBatch] = ()
        self.losses: dict[int, Tensor] = {}
        self._gradients, self._rotation, self._attends, self._recompute = gradients, rotation, attends, recompute
        self._segments: dict[int, list[_Segment]] = {}
        self._postponed: dict[int, list[list[Callable[[], None]]]] = {}
        self._units = StageUnits([placed.units for placed in blocks])

    def open_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Take the micro-batches that the coming actions are about."""
        self.micro_batches = micro_batches
        self.losses.clear()

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor:
        """Run the blocks; `train` keeps what backward needs. The head's output is its loss."""
        batch = self.micro_batches[micro_batch]
        x = batch.ids if x is None else x
        segments = []
        for place, placed in enumerate(self.blocks):
            self._units.gather(place, 1)
            keep_graph = train and not self._recompute
            segment = _open_segment(x)
            with torch.set_grad_enabled(keep_graph):
                y = self._run(placed.block, segment.input, batch)
            segment.output = y if keep_graph else None
            segments.append(segment)
            x = y.detach()
            self._units.release(place)
        if train:
            self._segments[micro_batch] = segments
        if isinstance(self.blocks[-1].block, Head):
            self.losses[micro_batch] = x
        return x

    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None:
        """Whole backward: gradients of parameters are added up, that of the input is returned."""
        return self._backward(micro_batch, dy, last=last)

    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None:
        """The input's gradient only; the weights' work waits for `backward_weight`."""
        self._postponed[micro_batch] = []
        return self._backward(micro_batch, dy, postponed=self._postponed[micro_batch])

    @torch.no_grad()  # unlike in a backward pass, autograd would record this
    def backward_weight(self, micro_batch: int, *, last: bool) -> None:
        """The weights' part of a backward pass whose `backward_input` has run."""
        for place, works in zip(reversed(range(len(self.blocks))), self._postponed.pop(micro_batch), strict=True):
            self._units.open_backward(place)
            for work in works:
                work()
            self._units.close_backward(place, last)

    def _backward(
        self,
        micro_batch: int,
        dy: Tensor | None,
        *,
        last: bool = False,
        postponed: list[list[Callable[[], None]]] | None = None,
    ) -> Tensor | None:
        batch = self.micro_batches[micro_batch]
        if dy is None:
            dy = batch.loss_scale
        segments = self._segments.pop(micro_batch)
        for place in reversed(range(len(self.blocks))):
            placed, segment = self.blocks[place], segments.pop()
            self._units.gather(place, -1)
            self._units.open_backward(place)
            if segment.output is None:
                segment = _open_segment(segment.input)
                with torch.enable_grad():
                    segment.output = self._run(placed.block, segment.input, batch)
            if postponed is not None:
                self._gradients.postpone()
            torch.autograd.backward(segment.output, dy)
            if postponed is None:
                self._units.close_backward(place, last)
            else:
                postponed.append(self._gradients.take())
            dy = segment.input.grad
            self._units.release(place)
        return dy

    def _run(self, block: Block, x: Tensor, batch: MicroBatch) -> Tensor:
        match block:
            case Embedding():
                return block(x)
            case Layer():
                return block(x, self._rotation, self._attends(block.index))
            case Head():
                return block.loss(x, batch.labels)


def _open_segment(x: Tensor) -> _Segment:
    return _Segment(x.detach().requires_grad_(x.is_floating_point()), None)
