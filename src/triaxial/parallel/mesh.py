"""`Mesh`: which ranks a rank talks to along each axis, and the collectives over them.

Every message of a run goes through an `Axis`, so that bytes are counted in one place and a failed
collective names its rank, operation and axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from triaxial.parallel.host import host_identity
from triaxial.parallel.shared import Combine, SharedMemory
from triaxial.plan.layout import Layout

# torch 2.13 renamed these two; 2.11 and 2.12 have only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommunicationError(RuntimeError):
    """A collective or message did not complete; the text names rank, operation and axis."""


class Pending:
    """A collective in flight: `wait()` ends it and returns its result."""

    def __init__(self, axis: Axis, operation: str, finish: Callable[[], Tensor]) -> None:
        self._axis, self._operation, self._finish = axis, operation, finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            with self._axis.naming(self._operation):
                self._result = self._finish()
        return self._result


@dataclass
class Axis:
    """One rank's peers along one axis; `ranks` are global, `index` is this rank's place among them."""

    name: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None = None
    timeout: timedelta | None = None
    """How long a rank waits for another; None is the backend's default."""
    one_host: bool = False
    """Whether all ranks are processes of one host."""
    shared: SharedMemory | None = None
    """Where they are, without GPUs: collectives go through it instead of the backend."""
    traffic: Counter[str] = field(default_factory=Counter)
    """Bytes this rank put into each kind of collective, as the planner counts them."""
    _in_flight: Pending | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @contextmanager
    def naming(self, operation: str) -> Iterator[None]:
        """Turn a backend's error into one that says which rank waited for what."""
        try:
            yield
        except RuntimeError as error:
            me = self.ranks[self.index]
            raise CommunicationError(
                f"rank {me}: {operation} over {self.name} (ranks {list(self.ranks)}) failed: {error}"
            ) from error

    def _count(self, operation: str, x: Tensor) -> None:
        self.traffic[operation] += x.numel() * x.element_size()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the axis, in place."""
        if self.shared is None or self._in_flight is not None:
            return self.all_reduce_async(x).wait()
        self._count("all_reduce", x)
        with self.naming("all_reduce"):
            for _ in self.shared.all_reduce(x, Tensor.add_):
                pass
        return x

    def all_reduce_async(self, x: Tensor) -> Pending:
        return self._reduce(x, dist.ReduceOp.SUM, Tensor.add_)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Largest value of each element over the axis, in place."""
        return self._reduce(x, dist.ReduceOp.MAX, lambda a, b: torch.maximum(a, b, out=a)).wait()

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType, combine: Combine) -> Pending:
        if self.size == 1:
            return self._done(x)
        self._count("all_reduce", x)
        if self.shared is not None:
            return self._through_memory("all_reduce", self.shared.all_reduce(x, combine), x)
        with self.naming("all_reduce"):
            work = dist.all_reduce(x, op=operation, group=self.group, async_op=True)
        return self._through_backend("all_reduce", [work], lambda: x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate every rank's `x` along dimension 0: [n, ...] -> [size * n, ...]."""
        return self.all_gather_async(x).wait()

    def all_gather_async(self, x: Tensor, out: Tensor | None = None) -> Pending:
        """Start an all-gather into `out` (which may hold `x` as its own part already)."""
        if self.size == 1:
            return self._done(x if out is None else out.copy_(x))
        x = x.contiguous()
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:])) if out is None else out
        self._count("all_gather", gathered)
        if self.shared is not None:
            return self._through_memory("all_gather", self.shared.all_gather(x, gathered), gathered)
        with self.naming("all_gather"):
            work = _all_gather(gathered, x, group=self.group, async_op=True)
        return self._through_backend("all_gather", [work], lambda: gathered)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum `x` over the axis and keep this rank's part of dimension 0: [size * n, ...] -> [n, ...]."""
        return self.reduce_scatter_async(x).wait()

    def reduce_scatter_async(self, x: Tensor) -> Pending:
        if self.size == 1:
            return self._done(x)
        self._count("reduce_scatter", x)
        x = x.contiguous()
        shape = (x.shape[0] // self.size, *x.shape[1:])
        if self.shared is not None:
            part = x.new_empty(shape)
            return self._through_memory("reduce_scatter", self.shared.reduce_scatter(x, part, Tensor.add_), part)
        with self.naming("reduce_scatter"):
            if x.is_cuda:
                part = x.new_empty(shape)
                work = _reduce_scatter(part, x, group=self.group, async_op=True)
                return self._through_backend("reduce_scatter", [work], lambda: part)
            parts = x.view(self.size, -1)
            received = torch.empty_like(parts)
            received[self.index].copy_(parts[self.index])
            works = self._exchange(parts, received)
        return self._through_backend("reduce_scatter", works, lambda: received.sum(0).view(shape))

    def _exchange(self, parts: Tensor, received: Tensor) -> list[dist.Work]:
        """Give each peer its row of `parts`, and take its row of `received` from each.

        Gloo's reduce-scatter moves whole buffers, and its all-to-all sends before it is ready to receive: word that it
        is then follows behind what it has sent on the same connection, and the two directions take turns.
        """
        group = self.group
        assert group is not None
        peers = [peer for peer in range(self.size) if peer != self.index]
        incoming = [group.recv([received[peer]], peer, 0) for peer in peers]
        return incoming + [group.send([parts[peer]], peer, 0) for peer in peers]

    def _done(self, result: Tensor) -> Pending:
        return Pending(self, "", lambda: result)

    def _through_backend(self, operation: str, works: list[dist.Work], result: Callable[[], Tensor]) -> Pending:
        def finish() -> Tensor:
            for work in works:
                work.wait()
            return result()

        return Pending(self, operation, finish)

    def _through_memory(self, operation: str, steps: Iterator[None], result: Tensor) -> Pending:
        """Post the operation's first message, after completing the one before it on this axis."""
        if self._in_flight is not None:
            self._in_flight.wait()
        with self.naming(operation):
            next(steps, None)

        def finish() -> Tensor:
            for _ in steps:
                pass
            self._in_flight = None
            return result

        self._in_flight = Pending(self, operation, finish)
        return self._in_flight


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout and its peers along every axis."""

    layout: Layout
    rank: int
    tp: Axis
    pp: Axis
    dp: Axis
    shard: Axis
    """Data-parallel ranks that ZeRO shards over."""
    replicate: Axis
    """Data-parallel ranks that hold the same shard."""
    kv: Axis
    """Tensor-parallel ranks that hold the same kv head."""
    ends: Axis
    """First and last pipeline rank: they share a tied embedding."""
    world: Axis
    device: torch.device


def coordinates(layout: Layout, rank: int) -> dict[str, int]:
    """Place of a rank along each axis; the first axis of `layout.order` varies fastest."""
    place = {}
    for axis in layout.order.split("-"):
        size = getattr(layout, axis)
        place[axis] = rank % size
        rank //= size
    return place


def rank_at(layout: Layout, place: dict[str, int]) -> int:
    """The inverse of `coordinates`."""
    rank, stride = 0, 1
    for axis in layout.order.split("-"):
        rank += place[axis] * stride
        stride *= getattr(layout, axis)
    return rank


def build_mesh(
    layout: Layout, rank: int, num_kv_heads: int, device: torch.device, timeout: timedelta | None = None
) -> Mesh:
    """Open this rank's groups. Every rank of the world must call it; the process group must exist."""
    here = coordinates(layout, rank)
    shard = layout.shard_size
    copies = max(1, layout.tp // num_kv_heads)
    first_shard, first_copy = here["dp"] // shard * shard, here["tp"] // copies * copies
    members = {
        "tp": [{"tp": i} for i in range(layout.tp)],
        "dp": [{"dp": i} for i in range(layout.dp)],
        "shard": [{"dp": first_shard + i} for i in range(shard)],
        "replicate": [{"dp": i} for i in range(here["dp"] % shard, layout.dp, shard)],
        "kv": [{"tp": first_copy + i} for i in range(copies)],
        "ends": [{"pp": i} for i in sorted({0, layout.pp - 1})],
        "pp": [{"pp": i} for i in range(layout.pp)],
    }
    axes = {
        name: _open_axis(name, [rank_at(layout, here | m) for m in places], rank, device, timeout)
        for name, places in members.items()
    }
    world = Axis("world", tuple(range(layout.world_size)), rank, dist.group.WORLD if layout.world_size > 1 else None)
    return Mesh(layout=layout, rank=rank, world=world, device=device, **axes)


def _open_axis(name: str, ranks: list[int], rank: int, device: torch.device, timeout: timedelta | None) -> Axis:
    if len(ranks) == 1:
        return Axis(name, (rank,), 0, one_host=True)
    group = open_group(ranks, rank, timeout)
    if rank not in ranks:  # a pipeline rank between the two ends
        return Axis(name, (rank,), 0)
    axis = Axis(name, tuple(ranks), ranks.index(rank), group, timeout, _on_one_host(group, len(ranks)))
    if device.type == "cpu" and axis.one_host:
        axis.shared = SharedMemory(group, axis.ranks, axis.index, timeout)
    return axis


def _on_one_host(group: dist.ProcessGroup, size: int) -> bool:
    identities = [""] * size
    dist.all_gather_object(identities, host_identity(), group=group)
    return len(set(identities)) == 1


def open_group(ranks: Sequence[int], rank: int, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A process group of `ranks`, opened by its members alone.

    torch finds the members' common name from the ranks and from how many groups each has opened before, so a rank
    that is not among them opens one of its own to keep count.
    """
    members = list(ranks) if rank in ranks else [rank]
    group: dist.ProcessGroup = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
    return group
