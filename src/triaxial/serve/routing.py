"""Which replica has seen a conversation before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_REMEMBERED = 8192
"""Prefixes."""
_SHORTEST = 16
"""Tokens of the shortest prefix that is told apart."""


class Conversations:
    """Remembers, for prefixes of doubling length, the replica that took them last.

    A conversation's next prompt begins with its last one, so the longest known prefix leads to its replica.
    """

    def __init__(self) -> None:
        self._replica_of: OrderedDict[int, int] = OrderedDict()
        self._turn = 0

    def place(self, prompt: Sequence[int], replicas: Sequence[int]) -> int:
        """One of `replicas`, which are equally good otherwise: the one that knows the prompt's longest prefix, or
        each in turn."""
        prefixes = _prefixes(prompt)
        known = (self._replica_of[prefix] for prefix in reversed(prefixes) if prefix in self._replica_of)
        chosen = next((index for index in known if index in replicas), replicas[self._turn % len(replicas)])
        self._turn += 1
        for prefix in prefixes:
            self._replica_of[prefix] = chosen
            self._replica_of.move_to_end(prefix)
        while len(self._replica_of) > _REMEMBERED:
            self._replica_of.popitem(last=False)
        return chosen


def _prefixes(prompt: Sequence[int]) -> list[int]:
    """Hashes of the first 16, 32, 64... tokens."""
    lengths = (_SHORTEST << step for step in range(max(0, (len(prompt) // _SHORTEST).bit_length())))
    return [hash(tuple(prompt[:length])) for length in lengths]
