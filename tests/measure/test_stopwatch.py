"""Times are taken by a clock that the test moves."""

import pytest
import torch

from triaxial.measure import stopwatch
from triaxial.measure.stopwatch import Stopwatch
from triaxial.parallel.mesh import Axis


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        """Another program has a third of this processor."""
        return self.now * 2 / 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def work(clock: Clock, seconds: list[float]):
    """Takes the next of these seconds each time, and then the last for ever."""
    calls = iter(seconds)

    def run() -> None:
        clock.now += next(calls, seconds[-1])

    return run


def watch(**how: float) -> Stopwatch:
    return Stopwatch(Axis("world", (0,), 0), torch.device("cpu"), 1.0, **how)


def test_neither_the_first_repetition_nor_a_disturbed_one_counts(clock: Clock) -> None:
    assert watch().seconds(work(clock, [0.25, 0.25, 9.0, 0.125, 0.25])) == 0.25


def test_where_ranks_take_turns_each_one_counts_whatever_else_waits(clock: Clock) -> None:
    found = watch(turns=3).seconds(work(clock, [9.0, 0.5, 0.25, 0.75]))
    assert found == pytest.approx(3 * 0.5 * 2 / 3)
    assert watch().seconds(work(clock, [0.25, 0.5, 0.0, 0.0, 0.0])) == 0.0


def test_long_work_is_repeated_three_times_and_short_work_not_for_ever(clock: Clock) -> None:
    watch().seconds(work(clock, [10.0]))
    assert clock.now == 4 * 10.0
    clock.now = 0.0
    watch().seconds(work(clock, [1e-6]))
    assert clock.now == pytest.approx(201 * 1e-6)
