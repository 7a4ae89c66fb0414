"""Collectives between ranks of one host through shared memory.

Every rank has a segment that its peers map, with two slots. A collective writes into one slot, tells the peers, and reads
theirs. The slots alternate: what a peer says of one message says as well that it has read all of the message before, so
nobody overwrites what is still being read. Long messages go slot by slot.

Peers are told through the segments where there are kernels for that, and else with a byte on a socket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from triaxial.kernels.exchange import exchange_between
from triaxial.kernels.library import Addresses, addresses
from triaxial.parallel.host import Peers

_HEAD_BYTES = 4 << 10
"""Of a segment, before its slots."""
_SLOT_BYTES = 4 << 20
_PART_BYTES = 128 << 10
"""Of a sum, at a time, between ranks that watch: what one wrote is still in its cache when its peers come for it."""
_ONE_SHOT_BYTES = 64 << 10
"""Up to here every rank of more than two reads all of every peer's message; beyond, each combines its own part."""
_SHAPES = 256
"""Of messages, whose slots are kept as tensors: making them takes longer than a short message."""

Combine = Callable[[Tensor, Tensor], object]
"""Adds, or otherwise joins, the second tensor into the first."""


class SharedMemory:
    """The peers of one axis on one host.

    Each operation is an iterator: its first step posts, the others complete. Operations run in order, and one must be
    complete before the next begins.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], index: int, timeout: timedelta | None) -> None:
        """Open and map the segments of all `ranks`; each of them must call this, with its place as `index`."""
        self._peers, self._size, self._index, self._messages = Peers(group, ranks, index, timeout), len(ranks), index, 0
        mine = self._peers.lend(self._peers.sockets, _HEAD_BYTES + 2 * _SLOT_BYTES)
        theirs = {peer: self._peers.borrow(peer) for peer in self._peers.sockets}
        whole = [torch.frombuffer(theirs.get(place, mine), dtype=torch.uint8) for place in range(self._size)]
        self._segments = [segment[_HEAD_BYTES:].view(2, _SLOT_BYTES) for segment in whole]
        self._slots = lru_cache(_SHAPES)(self._open_slots)
        self._part_bytes = _PART_BYTES if self._peers.watch_s else _SLOT_BYTES  # a part costs who sleeps a waking-up
        self._exchange = exchange_between([segment.data_ptr() for segment in whole], index)
        self._addresses = [addresses([segment[turn].data_ptr() for segment in self._segments]) for turn in range(2)]

    def all_reduce(self, x: Tensor, combine: Combine) -> Iterator[None]:
        """Combine x of every rank, in place and in rank order, so that every rank gets the same bits."""
        flat = x.view(-1)
        if self._size > 2 and flat.numel() % self._size == 0 and x.numel() * x.element_size() > _ONE_SHOT_BYTES:
            mine = flat.view(self._size, -1)[self._index]
            yield from self.reduce_scatter(flat, mine, combine)
            yield from self.all_gather(mine, flat)
            return
        if self._exchange and self._exchange.can_add(x) and combine is Tensor.add_:
            for part in flat.split(self._part_bytes // x.element_size()):
                self._write(part)
                yield
                self._exchange.add_up(part, self._arrived())
            return
        for part in flat.split(_SLOT_BYTES // x.element_size()):
            self._write(part)
            yield
            messages = self._read(part)
            if self._size == 2:  # either order gives the same bits
                combine(part, messages[1 - self._index])
                continue
            part.copy_(messages[0])
            for other in messages[1:]:
                combine(part, other)

    def all_gather(self, x: Tensor, out: Tensor) -> Iterator[None]:
        """x [n] of every rank, one after the other, into out [size * n]; x may be its own part of out."""
        columns = out.view(self._size, -1)
        start = 0
        for part in x.view(-1).split(_SLOT_BYTES // x.element_size()):
            self._write(part)
            yield
            for rank, theirs in enumerate(self._read(part)):
                columns[rank, start : start + part.numel()].copy_(theirs)
            start += part.numel()

    def reduce_scatter(self, x: Tensor, out: Tensor, combine: Combine) -> Iterator[None]:
        """Combine every rank's x [size * n], in rank order; this rank's part goes into out [n], which x may hold."""
        width = _SLOT_BYTES // x.element_size() // self._size
        for block, mine in zip(x.view(self._size, -1).split(width, dim=1), out.view(-1).split(width), strict=True):
            self._write(block)
            yield
            first, *others = self._read(block)
            mine.copy_(first[self._index])
            for other in others:
                combine(mine, other[self._index])

    def _write(self, message: Tensor) -> None:
        """Put a message into this rank's current slot and tell the peers."""
        turn = self._messages % 2
        if self._exchange is None:
            self._slots(turn, message.shape, message.dtype)[self._index].copy_(message)
            self._peers.ring()
        elif self._exchange.post(self._messages + 1, self._addresses[turn], message.contiguous()):
            self._peers.ring()

    def _read(self, like: Tensor) -> list[Tensor]:
        """Every rank's message of the same shape as this rank's; they are gone with the next message but one.

        Raises:
            RuntimeError: a peer ended, or stayed silent for longer than the timeout.
        """
        turn = self._messages % 2
        self._arrived()
        return self._slots(turn, like.shape, like.dtype)

    def _arrived(self) -> Addresses:
        """Wait for the message of every rank, and give out where they lie."""
        turn = self._messages % 2
        self._messages += 1
        if self._exchange is None:
            self._peers.hear()
        else:
            while (late := self._exchange.wait(self._messages, self._peers.watch_s)) is not None:
                self._peers.sleep_until_rung(late)
        return self._addresses[turn]

    def _open_slots(self, turn: int, shape: torch.Size, dtype: torch.dtype) -> list[Tensor]:
        """Every rank's slot of this turn (0 or 1) as a tensor."""
        size = math.prod(shape) * dtype.itemsize
        with torch.inference_mode(False):  # they outlive it
            return [segment[turn, :size].view(dtype).view(shape) for segment in self._segments]
