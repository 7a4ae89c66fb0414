"""`Timeline`: when every action began and ended, whether predicted by `simulate` or measured by the executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from triaxial.plan.pipeline.action import Action


class Span(NamedTuple):
    """One action from begin to end, in seconds on a clock that all ranks share."""

    action: Action
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The spans of each pipeline rank, in the order in which the rank ran them."""

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def begin_s(self) -> float:
        """The first begin over all ranks."""
        return min(span.begin_s for spans in self.ranks for span in spans[:1])

    @property
    def end_s(self) -> float:
        """The last end over all ranks."""
        return max(span.end_s for spans in self.ranks for span in spans[-1:])

    @property
    def step_time_s(self) -> float:
        """From the first begin to the last end over all ranks."""
        return self.end_s - self.begin_s

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each rank spends in actions."""
        return tuple(sum(span.end_s - span.begin_s for span in spans) for spans in self.ranks)

    @property
    def bubble_per_rank(self) -> tuple[float, ...]:
        """The part of the step, 0 to 1, in which each rank is idle."""
        step_s = self.step_time_s
        return tuple(1 - busy_s / step_s if step_s else 0.0 for busy_s in self.busy_s)

    @property
    def bubble_fraction(self) -> float:
        """The mean of `bubble_per_rank`: 1 - busy / (last end - first begin over all ranks)."""
        return sum(self.bubble_per_rank) / len(self.ranks)

    @property
    def bubble_rate(self) -> float:
        """The zero-bubble papers' bubble, (cost - m (TF + TB + TW)) / cost (arXiv 2401.10241, section 5.3).

        `cost` is the longest time from a rank's own first begin to its own last end. It does not count that ranks
        start one after the other, because the next step can start as staggered as this one ended. Where ranks differ
        in work, that of the busiest one is taken for m (TF + TB + TW).
        """
        cost = max((spans[-1].end_s - spans[0].begin_s for spans in self.ranks if spans), default=0.0)
        return 1 - max(self.busy_s) / cost if cost else 0.0
