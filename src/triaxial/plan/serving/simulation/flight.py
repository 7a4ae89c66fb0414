"""`Flight`: a step on its way through the stages, and rounds of them while nothing but decoding goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from triaxial.plan.serving.simulation.clock import Line
from triaxial.plan.serving.simulation.group import Group


@dataclass
class Flight:
    """A step on its way, or a run of `steps` in which nothing but decoding goes on."""

    group: Group
    """May be empty."""
    decoding: tuple[int, ...]
    """The group's members when it was sent, where steps are noted."""
    context: int
    """Tokens that the group reads in the first step, the new ones included (`Group.context_to_read`)."""
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """(request, tokens)"""
    pairs: int = 0
    ending: list[tuple[int, int]] = field(default_factory=list)
    """Prompts that end in the step: (request, its restarts)."""
    lines: tuple[Line, Line] | None = None
    """Of a step without prompts: its seconds, and those until the next can follow."""
    steps: int = 1
    start: float = 0.0
    end: float = 0.0
    interval: float = 0.0
    """Seconds until the next step can follow."""

    def elapsed(self, steps: int) -> float:
        """Seconds of so many steps of a run."""
        assert self.lines is not None
        return self.lines[0].elapsed(steps, len(self.group), self.context)

    def steps_until(self, now: float) -> int:
        """The fewest of its steps that are not over before `now`."""
        if self.lines is None or self.steps == 1:
            return self.steps
        return self.lines[0].steps_until(now - self.start, self.steps, len(self.group), self.context)

    def steps_done(self, now: float) -> int:
        """Those of its steps that are over."""
        if now >= self.end:
            return self.steps
        if self.steps == 1:
            return 0
        reached = self.steps_until(now)
        return reached if self.start + self.elapsed(reached) <= now else reached - 1


@dataclass
class Stages:
    """Steps go through the stages in order: one enters when the first stage is free, and ends no sooner than an
    `interval` after the one before it (a flow shop whose stages take equally long)."""

    entry_free: float = -math.inf
    last_end: float = -math.inf

    def send(self, flight: Flight, now: float, seconds: float, interval: float) -> None:
        flight.start = max(now, self.entry_free)
        flight.end = max(flight.start + seconds, self.last_end + interval)
        flight.interval = interval
        self.entry_free, self.last_end = flight.start + interval, flight.end

    def send_in_turn(self, flights: Sequence[Flight], most: int, until: float) -> list[Flight]:
        """Send each of these decode steps again as soon as it ends, at most `most` times, while it ends before `until`.

        Args:
            flights: in the order of their ends; they become the last ones sent.

        Returns: for each, those before the last as one run.
        """
        ends, contexts = [f.end for f in flights], [f.context for f in flights]
        busy = [0.0] * len(flights)
        intervals = [f.interval for f in flights]
        starts = [f.start for f in flights]
        figures = [(len(f.group), *f.lines[0][:2], *f.lines[1][:2]) for f in flights if f.lines]
        entry_free, last_end, sent = self.entry_free, self.last_end, 0
        # the arithmetic of `send`, without its calls: this loop runs for every token of a quiet pipeline
        for at in islice(cycle(range(len(flights))), most * len(flights)):
            end = ends[at]
            if end >= until:
                break
            size, fixed, slope, interval_fixed, interval_slope = figures[at]
            context = contexts[at] = contexts[at] + size
            busy[at] += intervals[at]
            interval = intervals[at] = interval_fixed + interval_slope * context
            start = starts[at] = end if end > entry_free else entry_free
            through, behind = start + fixed + slope * context, last_end + interval
            last_end = ends[at] = through if through > behind else behind
            entry_free = start + interval
            sent += 1
        self.entry_free, self.last_end = entry_free, last_end
        runs = []
        for at, flight in enumerate(flights):
            times = (sent - at + len(flights) - 1) // len(flights)
            runs.append(Flight(flight.group, (), flight.context, steps=times, interval=busy[at]))
            flight.start, flight.end, flight.context, flight.interval = (
                starts[at],
                ends[at],
                contexts[at],
                intervals[at],
            )
        return runs
