"""The data-parallel axis: parameters and gradients as flat buffers, replicated or sharded (ZeRO, arXiv 1910.02054).

A `Unit` holds the parameters of one block back to back in one buffer, so that one collective moves them all:

| zero | optimizer state | gradients | parameters | messages of a step |
|---|---|---|---|---|
| 0 | whole | whole | whole | one all-reduce |
| 1 | sharded | whole while they accumulate | whole | one reduce-scatter, one all-gather |
| 2 | sharded | sharded | whole | a reduce-scatter every micro-batch, one all-gather |
| 3 | sharded | sharded | sharded | as 2, and an all-gather before every forward and backward |

Hybrid sharding shards over part of the axis and all-reduces the shards over the rest, each as soon as it is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triaxial.model.weights import LocalParameter, Piece, Source, fill
from triaxial.parallel.mesh import Axis, Mesh, Pending

_ALIGNMENT = 16
"""Elements that parameters are aligned to in their buffer: 64 bytes of fp32, a cache line."""


@dataclass(frozen=True)
class Precision:
    """Types of what is computed with and of what is summed and kept."""

    compute: torch.dtype
    master: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
}


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


class Unit:
    """The parameters of one block on one rank.

    Attributes:
        parameters: what is held, in buffer order: matrices (which decay), then vectors.
        tensors: the local parameters by name; views of the whole buffer, with their gradients in `main_grad`.
        master: this rank's shard of the parameters in the master type; what the optimizer updates.
        gradient: this rank's shard of the summed gradients, complete after `finish_gradients`.
        start: where the shard begins in the whole buffer.
        counts: False for the second copy of a tied embedding, which norms leave out.
    """

    def __init__(
        self, parameters: Sequence[LocalParameter], mesh: Mesh, zero: int, precision: Precision, device: torch.device
    ) -> None:
        self.parameters = sorted(parameters, key=lambda p: not p.decays)
        self.shard, self.replicate = mesh.shard, mesh.replicate
        self.zero = zero if self.shard.size > 1 else 0
        self.offsets: dict[str, int] = {}
        end = 0
        for parameter in self.parameters:
            self.offsets[parameter.name] = end
            end += _aligned(parameter.numel)
        self.numel = -(-end // (_ALIGNMENT * self.shard.size)) * _ALIGNMENT * self.shard.size
        shard_numel = self.numel // self.shard.size
        self.start = shard_numel * self.shard.index
        self._whole = torch.zeros(self.numel, dtype=precision.compute, device=device)
        self._sums = torch.zeros(self.numel, dtype=precision.master, device=device)
        self.tensors = {p.name: self._parameter(p) for p in self.parameters}
        mine = self._whole[self.start : self.start + shard_numel]
        self._mine = mine if self.zero < 3 else mine.clone()  # in the compute type, as it is gathered
        self.master = mine.to(precision.master) if precision.master != precision.compute else self._mine
        self.gradient = self._sums if self.shard.size == 1 else torch.zeros_like(self.master)
        self._gathering: Pending | None = None
        self._reducing: Pending | None = None
        self._replicating: Pending | None = None
        self.counts = True
        self._users = self._unfinished = 0
        self._release_sums()

    def _parameter(self, parameter: LocalParameter) -> Tensor:
        where = slice(self.offsets[parameter.name], self.offsets[parameter.name] + parameter.numel)
        tensor = self._whole[where].view(parameter.shape).requires_grad_()
        tensor.main_grad = self._sums[where].view(parameter.shape)  # type: ignore[attr-defined]
        return tensor

    def load(self, source: Source) -> None:
        """Give every parameter its values from `source`, unrounded; call once, before the first step."""
        self.open_backward()  # the gradients' buffer, which is of the master type, takes the values first
        with torch.no_grad():
            for parameter in self.parameters:
                fill(parameter, self.tensors[parameter.name].main_grad, source)  # type: ignore[attr-defined]
            self._whole.copy_(self._sums)
            self.master.copy_(self._sums[self.start : self.start + self.master.numel()])
            self._mine.copy_(self.master)
        self._sums.zero_()
        self._release_sums()
        self.release()

    def restored(self) -> None:
        """`master` has been given its values, instead of by `load`: compute with them. All ranks must call it."""
        self.publish()
        self.release()

    def add_user(self) -> None:
        """One more block reads this unit in every forward pass (a tied embedding has two)."""
        self._users += 1

    # Parameters: whole only around their use under ZeRO-3.

    def start_gather(self) -> None:
        """Start to make the parameters whole; nothing to do unless they are sharded."""
        if self.zero == 3 and self._gathering is None and not self._whole.untyped_storage().size():
            _allocate(self._whole)
            # Written through `.data`: autograd must not see its saved views change between the passes.
            whole = self._whole.data
            self._gathering = self.shard.all_gather_async(self._mine, out=whole)

    def gather(self) -> None:
        """The parameters are whole when this returns."""
        self.start_gather()
        self.settle()

    def settle(self) -> None:
        """Parameters on their way from the other ranks, if any, are there when this returns."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def release(self) -> None:
        """The block is done with the parameters for now."""
        if self.zero == 3:
            self._whole.untyped_storage().resize_(0)

    def publish(self) -> None:
        """After the optimizer: bring the updated shards back into the parameters that are computed with."""
        if self._mine.data_ptr() != self.master.data_ptr():
            self._mine.data.copy_(self.master)
        if self.shard.size > 1 and self.zero < 3:
            self._gathering = self.shard.all_gather_async(self._mine.data, out=self._whole.data)

    # Gradients.

    def open_step(self) -> None:
        """Forget the last step's gradients."""
        self._unfinished = self._users
        if self.zero < 2:
            self._sums.zero_()
        if self.zero:
            self.gradient.zero_()

    def open_backward(self) -> None:
        """A block that uses this unit is about to add to the gradients."""
        self.finish_reduce()
        if self.zero >= 2 and not self._sums.untyped_storage().size():
            _allocate(self._sums)
            self._sums.zero_()

    def close_backward(self, *, last: bool) -> None:
        """A block has added to the gradients; `last`: it will not again in this step."""
        self._unfinished -= last
        if self.zero >= 2:
            self._reducing = self.shard.reduce_scatter_async(self._sums)
        elif last and not self._unfinished:
            reduce = self.shard.reduce_scatter_async if self.zero else self.replicate.all_reduce_async
            self._reducing = reduce(self._sums)

    @property
    def reduces_in_turn(self) -> bool:
        """Whether a reduction is to be finished once the next one has started: sharded gradients keep one whole buffer
        in flight, no more, and the shards of replicas go on to be summed over them."""
        return self.zero >= 2 or (self.zero == 1 and self.replicate.size > 1)

    def finish_reduce(self) -> None:
        """The reduction in flight, if any, is in `gradient` when this returns. If it was the step's last, the shard is
        on its way to be summed over its replicas."""
        if self._reducing is None:
            return
        part = self._reducing.wait()
        self._reducing = None
        if self.zero:
            self.gradient.add_(part)
            self._release_sums()
            if not self._unfinished:
                self._replicating = self.replicate.all_reduce_async(self.gradient)

    def finish_step(self) -> None:
        """`gradient` is summed over all data-parallel ranks when this returns."""
        self.finish_reduce()
        if self._replicating is not None:
            self._replicating.wait()
            self._replicating = None

    def _release_sums(self) -> None:
        if self.zero >= 2:
            self._sums.untyped_storage().resize_(0)

    # What the optimizer and the norms need to know of the flat shard.

    def decaying(self) -> tuple[slice | None, slice | None]:
        """The shard's parts with and without weight decay."""
        boundary = min((self.offsets[p.name] for p in self.parameters if not p.decays), default=self.numel)
        return self._in_shard(0, boundary), self._in_shard(boundary, self.numel)

    def counted(self) -> list[slice]:
        """The shard's parts that this rank counts in norms: no replicas, no padding."""
        return self._parts(lambda piece: piece.counted and self.counts)

    def partial(self, axis: str) -> list[slice]:
        """The shard's parts whose gradients are still to be summed over the tensor axis `axis` ("tp" or "kv")."""
        return self._parts(lambda piece: piece.summed_over == axis)

    def places(self) -> Iterator[tuple[LocalParameter, Piece, int]]:
        """Every piece with its parameter and its first element in the whole buffer."""
        for parameter in self.parameters:
            offset = self.offsets[parameter.name]
            for piece in parameter.pieces:
                yield parameter, piece, offset
                offset += math.prod(piece.local_shape)

    def held(self) -> Iterator[tuple[Piece, int, slice]]:
        """Every piece that the shard holds some of: its first element that is held, and where in the shard they lie."""
        for _, piece, offset in self.places():
            place = self._in_shard(offset, offset + math.prod(piece.local_shape))
            if place is not None:
                yield piece, self.start + place.start - offset, place

    def _parts(self, wanted: Callable[[Piece], bool]) -> list[slice]:
        spans = ((offset, offset + math.prod(piece.local_shape)) for _, piece, offset in self.places() if wanted(piece))
        return [part for span in spans if (part := self._in_shard(*span))]

    def _in_shard(self, start: int, stop: int) -> slice | None:
        """Elements [start, stop) of the whole buffer as a slice of the shard; None if there are none."""
        first, last = max(start, self.start) - self.start, min(stop, self.start + self.master.numel()) - self.start
        return slice(first, last) if first < last else None


def _allocate(buffer: Tensor) -> None:
    buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())


def finish_gradients(units: Sequence[Unit], mesh: Mesh, tied: Unit | None) -> None:
    """Complete every unit's `gradient`: the sums in flight, over tensor-parallel parts, and over the two copies of an
    embedding that is `tied` across pipeline ranks."""
    for unit in units:
        unit.finish_reduce()
    for unit in units:
        unit.finish_step()
    for axis in (mesh.tp, mesh.kv):
        _sum_parts([unit.gradient[part] for unit in units for part in unit.partial(axis.name)], axis)
    if tied is not None:
        mesh.ends.all_reduce(tied.gradient)


def _sum_parts(parts: list[Tensor], axis: Axis) -> None:
    """Sum small scattered tensors over an axis in one message, in place."""
    if parts and axis.size > 1:
        total = axis.all_reduce(torch.cat(parts))
        for part, summed in zip(parts, total.split([part.numel() for part in parts])):
            part.copy_(summed)


def gradient_norm_squared(units: Iterable[Unit], mesh: Mesh) -> Tensor:
    """This rank's share of the squared gradient norm: summed over the world, each element counts once."""
    norms = [torch.linalg.vector_norm(unit.gradient[part]) for unit in units for part in unit.counted()]
    if not norms or mesh.replicate.index:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(norms).double().square().sum().cpu()
