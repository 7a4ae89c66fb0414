"""Messages between the pipeline ranks of one host through shared memory, under any table and copied only once.

A sender lends each of its targets memory with a slot for every message of a step, so that within a step sending never
waits for the receiver. It writes a message into the first free slot and says on the connection which message lies where.
The receiver computes on the slot itself; once nothing refers to that tensor any more, the slot is free.
"""

from __future__ import annotations

import math
import mmap
import select
import struct
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from triaxial.parallel.host import Peers
from triaxial.parallel.messages import Message, receiving, sending

_NOTE = struct.Struct("<ii")
"""What a connection carries for a message: the place of its consumer in the table, and its slot."""
_NOTES_AT_ONCE = 512
_FREE, _TAKEN = b"\0", 1
_LOOK_AGAIN_S = 1e-3
"""For a slot that becomes free; a sender waits for one only when it is a step ahead of the receiver."""


class Mailbox:
    """One rank's messages. Several steps may be under way: a message is told from its next step's by their order."""

    def __init__(
        self, peers: Peers, num_slots: Mapping[tuple[int, int], int], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Exchange memory; every rank of the group must call this with the same `num_slots`.

        Args:
            num_slots: messages of one step from the first rank of each pair to the second.
            shape: of every message, as `dtype` is.
        """
        self._peers = peers
        out = {target: count for (source, target), count in num_slots.items() if source == peers.index}
        into = {source: count for (source, target), count in num_slots.items() if target == peers.index}
        lent = {peer: peers.lend([peer], _Slots.num_bytes(count, shape, dtype)) for peer, count in out.items()}
        self._out = {peer: _Slots(lent[peer], count, shape, dtype) for peer, count in out.items()}
        self._in = {peer: _Slots(peers.borrow(peer), count, shape, dtype) for peer, count in into.items()}
        self._arrived: dict[int, deque[int]] = defaultdict(deque)
        """Slots by the place of their consumer."""
        self._ended: set[int] = set()
        self._poll = select.poll()
        self._peer_of = {connection.fileno(): peer for peer, connection in peers.sockets.items()}
        for connection in peers.sockets.values():
            connection.setblocking(False)
            self._poll.register(connection, select.POLLIN)

    def open_step(self, *, train: bool) -> None:
        """Nothing to prepare."""

    def close_step(self) -> None:
        """Nothing to finish: what was sent has left this rank's hands."""

    def receive(self, message: Message) -> Tensor:
        """A message, to be kept and changed as one likes.

        Raises:
            CommunicationError: the source ended, or stayed silent for longer than the timeout.
        """
        slots, deadline = self._arrived[message.taken_at], self._deadline()
        if not slots:
            self._take_notes(message.source)
        while not slots:
            with receiving(self._peers.rank, message), self._peers.naming(message.source):
                self._check_alive(message.source)
                if not self._listen(deadline - time.monotonic()):
                    raise TimeoutError
        return self._in[message.source].open(slots.popleft())

    def send(self, message: Message, y: Tensor) -> None:
        """Give a copy of `y` away.

        Raises:
            CommunicationError: the target ended, or is a step behind for longer than the timeout.
        """
        slots, deadline = self._out[message.target], self._deadline()
        while (slot := slots.put(y)) is None:
            self._let_target_catch_up(message, deadline)
        while not self._tell(message, slot):
            self._let_target_catch_up(message, deadline)

    def _tell(self, message: Message, slot: int) -> bool:
        """False where the target has left a few hundred notes unread, or has ended."""
        try:
            self._peers.sockets[message.target].send(_NOTE.pack(message.taken_at, slot))
        except OSError:
            return False
        return True

    def _let_target_catch_up(self, message: Message, deadline: float) -> None:
        """Read notes for a moment, so that this rank keeps nobody waiting while it waits itself."""
        with sending(self._peers.rank, message), self._peers.naming(message.target):
            self._check_alive(message.target)
            if time.monotonic() > deadline:
                raise TimeoutError
            self._listen(_LOOK_AGAIN_S)

    def _listen(self, seconds: float) -> bool:
        """Wait for notes of any peer and take them in; whether there were any."""
        events = self._poll.poll(max(0.0, seconds * 1e3))
        for handle, _ in events:
            self._take_notes(self._peer_of[handle])
        return bool(events)

    def _take_notes(self, peer: int) -> None:
        """Those that are there already."""
        connection = self._peers.sockets[peer]
        try:
            notes = connection.recv(_NOTES_AT_ONCE * _NOTE.size)
        except BlockingIOError:
            return
        except ConnectionError:
            notes = b""
        for taken_at, slot in _NOTE.iter_unpack(notes):
            self._arrived[taken_at].append(slot)
        if not notes and peer not in self._ended:  # no error as long as nobody needs anything from it
            self._ended.add(peer)
            self._poll.unregister(connection)

    def _check_alive(self, peer: int) -> None:
        if peer in self._ended:
            raise ConnectionResetError

    def _deadline(self) -> float:
        return time.monotonic() + self._peers.timeout_s


class _Slots:
    """Memory from one rank to another: a byte for each slot that says whether it is taken, then the slots."""

    def __init__(self, memory: mmap.mmap, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._memory, self._count, self._shape, self._dtype = memory, count, shape, dtype
        self._first, self._stride = _whole_pages(count), _whole_pages(_size(shape, dtype))
        self._to_write: dict[int, Tensor] = {}
        self._read: dict[int, weakref.ref[np.ndarray]] = {}

    @staticmethod
    def num_bytes(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return _whole_pages(count) + count * _whole_pages(_size(shape, dtype))

    def put(self, y: Tensor) -> int | None:
        """Write a message into the first free slot, which is also the likeliest in cache; None if there is none."""
        slot = self._memory.find(_FREE, 0, self._count)
        if slot < 0:
            return None
        self._memory[slot] = _TAKEN
        if slot not in self._to_write:
            self._to_write[slot] = self._tensor(self._array(slot))
        self._to_write[slot].copy_(y)
        return slot

    def open(self, slot: int) -> Tensor:
        """The message in a slot, which is free again when the tensor and all its views are gone."""
        array = self._array(slot)
        self._read[slot] = weakref.ref(array, partial(_free, self._memory, slot))
        return self._tensor(array)

    def _array(self, slot: int) -> np.ndarray:
        """A slot in integers of the right size: numpy does not know all of torch's types."""
        return np.ndarray(self._shape, f"i{self._dtype.itemsize}", self._memory, self._first + slot * self._stride)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).view(self._dtype)


def _free(memory: mmap.mmap, slot: int, _: weakref.ref[np.ndarray]) -> None:
    memory[slot] = _FREE[0]


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
