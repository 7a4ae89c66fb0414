"""Ranks of one host: whether they are, connections between them, and memory that they share.

What passes between such ranks goes through shared memory (`parallel/shared.py`, `parallel/mailbox.py`): TCP over
loopback would copy it four times. The connections carry a few bytes a message, which wake the receiver and give out that
a peer has ended.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_DEFAULT_TIMEOUT = timedelta(minutes=30)
_WATCH_S = 100e-6
_RINGS = 4096


def machine_identity() -> str:
    """Equal on two ranks exactly if one running kernel shares its processors out to them."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # Linux
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def host_identity() -> str:
    """Equal on two ranks exactly if they can share memory: same machine and network namespace."""
    try:
        return f"{machine_identity()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # not Linux: no rank shares memory with another
        return f"{machine_identity()}/{os.getpid()}"


def _have_a_core_each(cores: Sequence[set[int]]) -> bool:
    """Whether ranks that may run on these either keep to their own, or are in a world that is no larger than that."""
    usable = set[int]().union(*cores)
    return sum(map(len, cores)) == len(usable) or dist.get_world_size() <= len(usable)


class Peers:
    """Connections from one rank to the others of its group, all of one host; each is known by its place in the group."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], index: int, timeout: timedelta | None) -> None:
        """Connect to all; every rank of the group must call this, with its own place as `index`."""
        self.index, self.size, self.timeout_s = index, len(ranks), (timeout or _DEFAULT_TIMEOUT).total_seconds()
        self.sockets: dict[int, socket.socket] = {}
        self.rank, self._ranks = ranks[index], ranks
        address = f"\0triaxial-{uuid.uuid4()}"  # abstract: it has no file and ends with its process
        addresses: list[tuple[str, set[int]]] = [("", set())] * self.size
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(self.size)
            listener.settimeout(self.timeout_s)
            dist.all_gather_object(addresses, (address, os.sched_getaffinity(0)), group=group)
            for peer in range(index):
                self.sockets[peer] = socket.socket(socket.AF_UNIX)
                self.sockets[peer].connect(addresses[peer][0])
                self.sockets[peer].sendall(index.to_bytes(4, "little"))
            for _ in range(index + 1, self.size):
                connection, _ = listener.accept()
                self.sockets[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")] = connection
        for connection in self.sockets.values():
            connection.settimeout(self.timeout_s)
        self.watch_s = _WATCH_S if _have_a_core_each([cores for _, cores in addresses]) else 0.0
        """How long to look for a message before going to sleep."""

    def lend(self, peers: Iterable[int], num_bytes: int) -> mmap.mmap:
        """Zeroed memory that each of `peers` sees too once it calls `borrow`; pages that nobody touches cost nothing."""
        handle = os.memfd_create("triaxial")
        try:
            os.ftruncate(handle, num_bytes)
            for peer in peers:
                with self.naming(peer):
                    socket.send_fds(self.sockets[peer], [b"\0"], [handle])
            return mmap.mmap(handle, num_bytes)
        finally:
            os.close(handle)

    def borrow(self, peer: int) -> mmap.mmap:
        """The memory that `peer` lends."""
        with self.naming(peer):
            _, handles, _, _ = socket.recv_fds(self.sockets[peer], 1, 1)
            if not handles:
                raise ConnectionResetError
        try:
            return mmap.mmap(handles[0], os.fstat(handles[0]).st_size)
        finally:
            os.close(handles[0])

    def ring(self) -> None:
        """Send every peer a byte."""
        for peer, connection in self.sockets.items():
            with self.naming(peer), suppress(BlockingIOError):  # one that does not read has enough to wake up by
                os.write(connection.fileno(), b"\0")  # `send` would ask first whether it may

    def hear(self) -> None:
        """Take a byte of every peer."""
        for peer, connection in self.sockets.items():
            with self.naming(peer):
                if not (self.soon(connection) or connection.recv(1)):
                    raise ConnectionResetError

    def sleep_until_rung(self, peer: int) -> None:
        """Wait for a byte of this peer, and take all that it has sent."""
        with self.naming(peer):
            if not self.sockets[peer].recv(_RINGS):
                raise ConnectionResetError

    def soon(self, connection: socket.socket) -> bytes:
        """A byte from a peer if it comes within the time that going to sleep and waking up would take; else nothing.

        Where ranks share cores the one that waits would hold up the one that works, so there nobody watches.
        """
        deadline = time.perf_counter() + self.watch_s
        while True:
            with suppress(BlockingIOError):
                return os.read(connection.fileno(), 1)
            if time.perf_counter() >= deadline:
                return b""

    @contextmanager
    def naming(self, peer: int) -> Iterator[None]:
        """Say which rank fell silent, in the words of the backends' own errors."""
        try:
            yield
        except TimeoutError:
            raise RuntimeError(f"timed out after {self.timeout_s:g} s waiting for rank {self._ranks[peer]}") from None
        except ConnectionError:
            raise RuntimeError(f"connection closed by rank {self._ranks[peer]}") from None
