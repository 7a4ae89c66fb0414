"""`Group`: sequences that decode in the same steps, kept as sums, so that a step costs the same however many they are."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable


class Group:
    """Each step gives every member a token. Members are numbered by their arrival.

    `held` of a member is the number of its tokens, of which the first may lie behind a sliding window. In its next step
    it gives back blocks that lie there wholly, and then takes a new one if it has filled the last.
    """

    def __init__(self, block_tokens: int, window: int | None = None) -> None:
        self.members: list[int] = []  # sorted
        self.context = 0
        """Tokens that all members hold."""
        self._block_tokens, self._window = block_tokens, window
        self._steps = 0
        self._base: dict[int, int] = {}  # tokens a member would have held before the group's first step
        self._ends: list[tuple[int, int]] = []  # a heap: (the group's step that gives its last token, member)
        self._filling = [0] * block_tokens  # members by base modulo block_tokens
        self._longest: list[tuple[int, int]] = []  # a heap: (-base, member); entries of those that have left are void
        self._dropped: dict[int, int] = {}  # blocks that a member has given back, where there is a window

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, member: int) -> bool:
        return member in self._base

    def add(self, member: int, held: int, left: int, dropped: int = 0) -> None:
        """A member joins with so many tokens, which has yet to give `left` of them, at least 1, and has given back
        `dropped` blocks."""
        bisect.insort(self.members, member)
        self.context += held
        base = self._base[member] = held - self._steps
        self._filling[base % self._block_tokens] += 1
        heapq.heappush(self._ends, (self._steps + left, member))
        heapq.heappush(self._longest, (-base, member))
        if self._window is not None:
            self._dropped[member] = dropped

    def remove(self, member: int) -> tuple[int, int]:
        """Returns: the blocks that it holds, and the tokens that it has yet to give."""
        end = next(end for end, who in self._ends if who == member)
        self._ends.remove((end, member))
        heapq.heapify(self._ends)
        return self._forget(member), end - self._steps

    def _forget(self, member: int) -> int:
        del self.members[bisect.bisect_left(self.members, member)]
        base = self._base.pop(member)
        self._filling[base % self._block_tokens] -= 1
        self.context -= base + self._steps
        return -(-(base + self._steps) // self._block_tokens) - self._dropped.pop(member, 0)

    def context_to_read(self, uneven: float) -> int:
        """As many tokens as take as long to read as those that the members hold, because the longest holds up the
        others: it grows in each step as they do."""
        if not uneven or not self.members:
            return self.context
        while self._base.get(self._longest[0][1]) != -self._longest[0][0]:
            heapq.heappop(self._longest)
        longest = self._steps - self._longest[0][0]
        return self.context + round(uneven * (len(self.members) * longest - self.context))

    @property
    def steps_left(self) -> int:
        """Steps until the first member has given its last token."""
        return self._ends[0][0] - self._steps

    def new_blocks(self, steps: int) -> int:
        """Blocks that the members take in the next so many steps."""
        rounds, rest = divmod(steps, self._block_tokens)
        blocks = rounds * len(self.members)
        for step in range(self._steps, self._steps + rest):
            blocks += self._filling[-step % self._block_tokens]
        return blocks

    def dropped_blocks(self, steps: int) -> int:
        """Blocks that the members give back in the next so many steps."""
        return sum(self._behind(member, steps) - dropped for member, dropped in self._dropped.items())

    def _behind(self, member: int, steps: int) -> int:
        """Blocks that a member has given back after so many more steps: those that its last token did not see."""
        assert self._window is not None
        return max(0, self._base[member] + self._steps + steps - self._window) // self._block_tokens

    def lacks(self, blocks: int) -> bool:
        """Whether so many blocks are too few for the next step, in which the members give back and take in turn."""
        if self._window is None or self.new_blocks(1) <= blocks:
            return self.new_blocks(1) > blocks
        for member in self.members:
            blocks += self._behind(member, 1) - self._dropped[member]
            blocks -= (self._base[member] + self._steps) % self._block_tokens == 0
            if blocks < 0:
                return True
        return False

    def steps_within(self, blocks: int, most: int) -> int:
        """The most of `most` steps that take no more than so many blocks, whatever is given back."""
        if self.new_blocks(most) <= blocks:
            return most
        rounds = blocks // len(self.members)
        steps, left = rounds * self._block_tokens, blocks - rounds * len(self.members)
        while (need := self._filling[-(self._steps + steps) % self._block_tokens]) <= left:
            steps, left = steps + 1, left - need
        return steps

    def step(self, steps: int = 1) -> None:
        for member in self._dropped:
            self._dropped[member] = self._behind(member, steps)
        self._steps += steps
        self.context += steps * len(self.members)

    def pop_ended(self) -> list[tuple[int, int]]:
        """Members that have given their last token leave; each with the blocks that it held."""
        ended = []
        while self._ends and self._ends[0][0] <= self._steps:
            member = heapq.heappop(self._ends)[1]
            ended.append((member, self._forget(member)))
        return ended

    def split(self, first: int) -> Group:
        """The first so many members leave as a group of their own."""
        leaving = Group(self._block_tokens, self._window)
        leaving._take(self, self.members[:first])
        return leaving

    def merge(self, other: Group) -> None:
        """All members of `other` join; it is empty afterwards."""
        self._take(other, list(other.members))

    def _take(self, other: Group, members: Iterable[int]) -> None:
        left = {member: end - other._steps for end, member in other._ends}
        for member in members:
            held, dropped = other._base[member] + other._steps, other._dropped.get(member, 0)
            self.add(member, held, left[member], dropped)
            other._forget(member)
        other._ends = [(end, member) for end, member in other._ends if member in other._base]
        heapq.heapify(other._ends)
