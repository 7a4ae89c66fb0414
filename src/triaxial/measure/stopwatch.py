"""Seconds of a piece of work on this rank's device, while all other ranks do the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from triaxial.parallel.mesh import Axis

Work = Callable[[], object]

_WINDOWS = 2
"""Budgets that ranks on shared processors work for, many turns each."""


class Stopwatch:
    """Times work that every rank of the world starts together.

    A piece is repeated until `budget_s` is spent, and at least `_LEAST` times after a warm-up; ranks agree on how often.
    """

    _LEAST, _MOST = 3, 200

    def __init__(self, world: Axis, device: torch.device, budget_s: float, *, shared: bool = False) -> None:
        """`shared`: ranks take turns on their processors, so that a median would leave the waiting out."""
        self.world, self.device, self.budget_s, self._shared = world, device, budget_s, shared
        self.typical: Callable[[list[float]], float] = statistics.fmean if shared else statistics.median

    def seconds(self, work: Work) -> float:
        """Seconds of one repetition, averaged over the ranks."""
        own_seconds = self._seconds_in_window if self._shared else self.own_seconds
        return self._sum(own_seconds(work)) / self.world.size

    def _seconds_in_window(self, work: Work) -> float:
        """Mean seconds of a repetition in a time that all ranks fill: one that is done early would free a processor."""
        work()
        self.barrier()
        began, repeats, passed = time.perf_counter(), 0, 0.0
        while passed < _WINDOWS * self.budget_s or repeats < self._LEAST:
            work()
            repeats, passed = repeats + 1, time.perf_counter() - began
        return passed / repeats

    def slowest(self, work: Work, *, in_step: bool = False) -> float:
        """Seconds of one repetition on the rank that takes longest; `in_step`: all ranks begin each one together."""
        return max(self.each(self.own_seconds(work, in_step=in_step)))

    def own_seconds(self, work: Work, *, in_step: bool = False) -> float:
        """Typical seconds of one repetition on this rank."""
        first = max(self.each(self._timed(work)))
        repeats = int(min(self._MOST, max(self._LEAST, self.budget_s / max(first, 1e-7))))
        self.barrier()
        seconds = []
        for _ in range(repeats):
            if in_step:
                self.barrier()
            seconds.append(self._timed(work))
        return self.typical(seconds)

    def each(self, seconds: float) -> list[float]:
        """Every rank's own number, by rank."""
        mine = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        gathered: list[float] = self.world.all_gather(mine).tolist()
        return gathered

    def barrier(self) -> None:
        """Return when every rank is here."""
        self._sum(0.0)

    def _timed(self, work: Work) -> float:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def _sum(self, number: float) -> float:
        return sum(self.each(number))
