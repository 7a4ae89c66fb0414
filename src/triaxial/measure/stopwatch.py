"""Seconds of a piece of work on this rank's device, while all other ranks do the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from triaxial.parallel.mesh import Axis

Work = Callable[[], object]


class Stopwatch:
    """Times work that every rank of the world starts together.

    A piece is repeated until `budget_s` is spent, and at least `_LEAST` times after a warm-up; ranks agree on how often.
    """

    _LEAST, _MOST = 3, 200

    def __init__(self, world: Axis, device: torch.device, budget_s: float, *, turns: float | None = None) -> None:
        """`turns`: ranks to a processor, where each computes in a single thread; more than one take turns, so that a
        median would leave the waiting out."""
        self.world, self.device, self.budget_s, self._turns = world, device, budget_s, turns
        self.typical: Callable[[list[float]], float] = statistics.fmean if (turns or 1) > 1 else statistics.median

    def seconds(self, work: Work) -> float:
        """Seconds of one repetition, averaged over the ranks."""
        own = self.own_seconds(work) if self._turns is None else self._turns * self._computed_seconds(work)
        return self._sum(own) / self.world.size

    def _computed_seconds(self, work: Work) -> float:
        """Mean seconds that a repetition computes in a time that all ranks fill. When others, or other programs, have
        the processor is chance, and left out."""
        work()
        self.barrier()
        began, computed, repeats = time.perf_counter(), time.thread_time(), 0
        while time.perf_counter() - began < self.budget_s or repeats < self._LEAST:
            work()
            repeats += 1
        return (time.thread_time() - computed) / repeats

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
