"""Ranks of one host that tell each other of messages in shared memory (`exchange.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from triaxial.kernels.library import NUMBER, POINTER, SUFFIXES, Addresses, addresses, declared, library


def exchange_between(boards: Sequence[int], index: int) -> Exchange | None:
    """An exchange over boards at these addresses, where there are kernels."""
    found = library()
    return None if found is None else Exchange(found, boards, index)


class Exchange:
    """Ranks of one host that tell each other of messages in shared memory (`exchange.cpp`).

    Every rank has a board of 128 bytes, zeros at first, that all of them map.
    """

    def __init__(self, library: ctypes.CDLL, boards: Sequence[int], index: int) -> None:
        """Addresses of all ranks' boards, and which is this rank's."""
        self._size, self._index = len(boards), index
        self._boards = addresses(boards)
        self._post = declared(library.post, POINTER, NUMBER, NUMBER, NUMBER, POINTER, POINTER, NUMBER)
        self._await = declared(library.await_all, POINTER, NUMBER, NUMBER, NUMBER, NUMBER)
        sums = {dtype: getattr(library, f"add_up_{suffix}") for dtype, suffix in SUFFIXES.items()}
        self._sums = {dtype: declared(function, POINTER, POINTER, NUMBER, NUMBER) for dtype, function in sums.items()}

    def post(self, number: int, slots: Addresses, message: Tensor) -> bool:
        """Put this rank's message of this number into its own of the ranks' slots; whether a peer sleeps."""
        slot, num_bytes = slots[self._index], message.numel() * message.element_size()
        return bool(self._post(self._boards, self._size, self._index, number, slot, message.data_ptr(), num_bytes))

    def wait(self, number: int, patience_s: float) -> int | None:
        """Until every peer's message of this number does; a peer that let this rank wait so long, if one did."""
        late: int = self._await(self._boards, self._size, self._index, number, int(patience_s * 1e9))
        return None if late < 0 else late

    def can_add(self, x: Tensor) -> bool:
        return x.dtype in self._sums

    def add_up(self, x: Tensor, messages: Addresses) -> None:
        """The sum over all ranks of what lies at `messages`, in their order, into x."""
        self._sums[x.dtype](x.data_ptr(), messages, self._size, x.numel())
