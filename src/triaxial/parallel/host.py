"""Collectives between ranks of one host through shared memory: what TCP over loopback would copy four times.

Every rank has a segment that its peers map, with two slots. A collective writes into one slot, tells the peers with a
byte on a socket, and reads theirs. The slots alternate: a peer's byte for one message says that it has read all of the
message before, so nobody overwrites what is still being read. Long messages go slot by slot.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_SLOT_BYTES = 4 << 20
_SEGMENTS = Path("/dev/shm")
_ONE_SHOT_BYTES = 64 << 10
"""Up to here every rank of more than two reads all of every peer's message; beyond, each combines its own part."""
_DEFAULT_TIMEOUT = timedelta(minutes=30)

Combine = Callable[[Tensor, Tensor], object]
"""Adds, or otherwise joins, the second tensor into the first."""


def host_identity() -> str:
    """Equal on two ranks exactly if they share memory: same running kernel and network namespace."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel}/{os.stat('/proc/self/ns/net').st_ino}/{os.stat(_SEGMENTS).st_dev}"
    except OSError:  # not Linux: no rank shares memory with another
        return f"{socket.gethostname()}/{os.getpid()}"


class SharedMemory:
    """The peers of one axis on one host.

    Each operation is an iterator: its first step posts, the others complete. Operations run in order, and one must be
    complete before the next begins.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], index: int, timeout: timedelta | None) -> None:
        """Open and map the segments of all `ranks`; each of them must call this, with its place as `index`."""
        self._ranks, self._size, self._index, self._messages = ranks, len(ranks), index, 0
        self._timeout_s = (timeout or _DEFAULT_TIMEOUT).total_seconds()
        handle, path = tempfile.mkstemp(prefix="triaxial-", dir=_SEGMENTS)
        os.ftruncate(handle, 2 * _SLOT_BYTES)
        os.close(handle)
        try:
            self._connect(group, path)
        finally:
            os.unlink(path)  # mapped by all: the memory goes with the last process

    def _connect(self, group: dist.ProcessGroup, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_address(path))
            listener.listen(self._size)
            listener.settimeout(self._timeout_s)
            paths: list[str] = [""] * self._size
            dist.all_gather_object(paths, path, group=group)
            self._segments = [
                torch.from_file(peer, shared=True, size=2 * _SLOT_BYTES, dtype=torch.uint8).view(2, _SLOT_BYTES)
                for peer in paths
            ]
            self._sockets: dict[int, socket.socket] = {}
            for peer in range(self._index):
                self._sockets[peer] = socket.socket(socket.AF_UNIX)
                self._sockets[peer].connect(_address(paths[peer]))
                self._sockets[peer].sendall(self._index.to_bytes(4, "little"))
            for _ in range(self._index + 1, self._size):
                connection, _ = listener.accept()
                self._sockets[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")] = connection
        for connection in self._sockets.values():
            connection.settimeout(self._timeout_s)
        dist.barrier(group)  # nobody unlinks a segment that a peer has not mapped

    def all_reduce(self, x: Tensor, combine: Combine) -> Iterator[None]:
        """Combine x of every rank, in place and in rank order, so that every rank gets the same bits."""
        flat = x.view(-1)
        if self._size > 2 and flat.numel() % self._size == 0 and x.numel() * x.element_size() > _ONE_SHOT_BYTES:
            mine = flat.view(self._size, -1)[self._index]
            yield from self.reduce_scatter(flat, mine, combine)
            yield from self.all_gather(mine, flat)
            return
        for part in flat.split(_SLOT_BYTES // x.element_size()):
            self._write(part)
            yield
            first, *others = self._read(part)
            part.copy_(first)
            for other in others:
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
        self._slot(self._index, message).copy_(message)
        for peer, connection in self._sockets.items():
            with self._naming(peer):
                connection.send(b"\0")

    def _read(self, like: Tensor) -> list[Tensor]:
        """Every rank's message of the same shape as this rank's; they are gone with the next message but one.

        Raises:
            RuntimeError: a peer ended, or stayed silent for longer than the timeout.
        """
        for peer, connection in self._sockets.items():
            with self._naming(peer):
                if not connection.recv(1):
                    raise ConnectionResetError
        slots = [self._slot(rank, like) for rank in range(self._size)]
        self._messages += 1
        return slots

    @contextmanager
    def _naming(self, peer: int) -> Iterator[None]:
        """Say which rank fell silent, in the words of the backends' own errors."""
        try:
            yield
        except TimeoutError:
            raise RuntimeError(f"timed out after {self._timeout_s:g} s waiting for rank {self._ranks[peer]}") from None
        except ConnectionError:
            raise RuntimeError(f"connection closed by rank {self._ranks[peer]}") from None

    def _slot(self, rank: int, like: Tensor) -> Tensor:
        """The current slot of a rank as a tensor of the same shape and type as `like`."""
        size = like.numel() * like.element_size()
        return self._segments[rank][self._messages % 2, :size].view(like.dtype).view(like.shape)


def _address(path: str) -> str:
    """Abstract socket name: it has no file and ends with its process."""
    return f"\0{Path(path).name}"
