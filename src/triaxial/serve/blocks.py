"""Which blocks of the KV cache are free: the front's side of paging. Nothing here imports torch."""

from __future__ import annotations

import heapq


class BlockPool:
    """Blocks of `block_tokens` tokens, numbered from 0.

    Each of `slots` sequences has a home: a run of blocks that it is given first, in order, as long as nobody else holds
    them. A sequence at home lies in one piece, which attention reads where it is instead of gathering it. Nothing is
    reserved: whoever finds no room at home takes any other block, from the last on.
    """

    def __init__(self, total: int, block_tokens: int, slots: int) -> None:
        self.total, self.block_tokens, self.home = total, block_tokens, total // slots
        self._free = set(range(total))
        self._last = [-block for block in range(total)]  # a heap, in which blocks that were taken are passed over
        heapq.heapify(self._last)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one sequence."""
        return -(-tokens // self.block_tokens)

    def take(self, slot: int, first: int, count: int) -> list[int]:
        """The sequence's blocks from its block `first` on; so many must be free."""
        return [self._take(slot, place) for place in range(first, first + count)]

    def _take(self, slot: int, place: int) -> int:
        block = slot * self.home + place
        if place >= self.home or block not in self._free:
            block = -heapq.heappop(self._last)
            while block not in self._free:
                block = -heapq.heappop(self._last)
        self._free.remove(block)
        return block

    def give_back(self, blocks: list[int]) -> None:
        self._free.update(blocks)
        for block in blocks:
            heapq.heappush(self._last, -block)
