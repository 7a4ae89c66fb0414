"""`Group`: sequences that decode in the same steps, kept as sums, so that a step costs the same however many they are."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable


class Group:
    """Each step gives every member a token. Members are numbered by their arrival.

    `held` of a member is the number of its tokens in the KV cache; a member with `held` tokens in blocks of
    `block_tokens` takes a new block in its next step if it has filled the last one.
    """

    def __init__(self, block_tokens: int) -> None:
        self.members: list[int] = []  # sorted
        self.context = 0
        """Tokens that all members hold."""
        self._block_tokens = block_tokens
        self._steps = 0
        self._base: dict[int, int] = {}  # tokens a member would have held before the group's first step
        self._ends: list[tuple[int, int]] = []  # a heap: (the group's step that gives its last token, member)
        self._filling = [0] * block_tokens  # members by base modulo block_tokens

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, member: int) -> bool:
        return member in self._base

    def add(self, member: int, held: int, left: int) -> None:
        """A member joins that holds so many tokens and has yet to give `left` of them, at least 1."""
        bisect.insort(self.members, member)
        self.context += held
        base = self._base[member] = held - self._steps
        self._filling[base % self._block_tokens] += 1
        heapq.heappush(self._ends, (self._steps + left, member))

    def remove(self, member: int) -> tuple[int, int]:
        """Returns: the tokens that it holds, and has yet to give."""
        end = next(end for end, who in self._ends if who == member)
        self._ends.remove((end, member))
        heapq.heapify(self._ends)
        return self._forget(member), end - self._steps

    def _forget(self, member: int) -> int:
        del self.members[bisect.bisect_left(self.members, member)]
        base = self._base.pop(member)
        self._filling[base % self._block_tokens] -= 1
        self.context -= base + self._steps
        return base + self._steps

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

    def steps_within(self, blocks: int, most: int) -> int:
        """The most of `most` steps that take no more than so many blocks."""
        if self.new_blocks(most) <= blocks:
            return most
        rounds = blocks // len(self.members)
        steps, left = rounds * self._block_tokens, blocks - rounds * len(self.members)
        while (need := self._filling[-(self._steps + steps) % self._block_tokens]) <= left:
            steps, left = steps + 1, left - need
        return steps

    def step(self, steps: int = 1) -> None:
        self._steps += steps
        self.context += steps * len(self.members)

    def pop_ended(self) -> list[tuple[int, int]]:
        """Members that have given their last token leave; each with the tokens that it held."""
        ended = []
        while self._ends and self._ends[0][0] <= self._steps:
            member = heapq.heappop(self._ends)[1]
            ended.append((member, self._forget(member)))
        return ended

    def split(self, first: int) -> Group:
        """The first so many members leave as a group of their own."""
        leaving = Group(self._block_tokens)
        leaving._take(self, self.members[:first])
        return leaving

    def merge(self, other: Group) -> None:
        """All members of `other` join; it is empty afterwards."""
        self._take(other, list(other.members))

    def _take(self, other: Group, members: Iterable[int]) -> None:
        left = {member: end - other._steps for end, member in other._ends}
        for member in members:
            self.add(member, other._base[member] + other._steps, left[member])
            other._forget(member)
        other._ends = [(end, member) for end, member in other._ends if member in other._base]
        heapq.heapify(other._ends)
