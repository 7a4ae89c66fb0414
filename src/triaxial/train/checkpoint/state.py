"""What one rank holds of the training state, told as parts of global tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from triaxial.parallel.data import Unit
from triaxial.train.checkpoint.boxes import Box, run_of_boxes, shape_of, shift, volume
from triaxial.train.optimizer import Optimizer

WEIGHTS = "model"
KINDS = (WEIGHTS, "optimizer.exp_avg", "optimizer.exp_avg_sq")
"""Of every parameter, the values that training continues from: parameters in the master type, AdamW's moments."""


@dataclass(frozen=True)
class TrainingState:
    """This rank's flat shards of parameters and optimizer state."""

    units: Sequence[Unit]
    optimizer: Optimizer

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for unit in self.units for buffer in self.buffers(unit))

    def buffers(self, unit: Unit) -> tuple[Tensor, ...]:
        """A unit's shard [numel] of each of `KINDS`."""
        moments = self.optimizer.moments[unit]
        return unit.master.data, moments.exp_avg, moments.exp_avg_sq


@dataclass(frozen=True)
class Part:
    """A box of the global tensor `name` and where its elements lie in a flat buffer."""

    name: str
    box: Box
    where: slice

    def of(self, buffer: Tensor) -> Tensor:
        """The part as a view of the buffer, in the box's shape."""
        return buffer[self.where].view(shape_of(self.box))


def parts_of(unit: Unit) -> Iterator[Part]:
    """All that a unit's shard holds, but for padding."""
    return _parts(unit, 0, unit.master.numel(), replicas=True)


def own_parts(unit: Unit) -> Iterator[Part]:
    """What this rank writes of a unit, placed within `own_portion`: every element of the model has one writer."""
    if unit.counts:
        portion = own_portion(unit)
        yield from _parts(unit, portion.start, portion.stop, replicas=False)


def own_portion(unit: Unit) -> slice:
    """The part of a shard that this rank writes: ranks that hold the same shard share the work."""
    numel, axis = unit.master.numel(), unit.replicate
    return slice(numel * axis.index // axis.size, numel * (axis.index + 1) // axis.size)


def _parts(unit: Unit, first: int, last: int, *, replicas: bool) -> Iterator[Part]:
    """Elements [first, last) of a unit's shard, placed from `first` on."""
    for piece, begin, place in unit.held():
        start, stop = max(place.start, first), min(place.stop, last)
        if start >= stop or not (piece.counted or replicas):
            continue
        begin += start - place.start
        offset = start - first
        for local in run_of_boxes(piece.local_shape, begin, begin + stop - start):
            yield Part(piece.name, shift(local, piece.dim, piece.start), slice(offset, offset + volume(local)))
            offset += volume(local)
