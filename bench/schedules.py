"""How fast schedules are simulated. Prints one Markdown table: `python bench/schedules.py`."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

from triaxial.plan.schedule import Durations, ScheduleKind, build_schedule
from triaxial.plan.simulate import StageCosts, Transfer, simulate
from triaxial.plan.validate_schedule import check_schedule

TRANSFER = Transfer(num_bytes=64e6, latency_s=5e-6, bytes_per_s=50e9)
ROUNDS = 5


def best_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of the fastest of some rounds: what other processes disturb least."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def simulation(kind: ScheduleKind, ranks: int, micro_batches: int, times: int) -> tuple[float, int]:
    """Seconds of `times` simulations with costs that differ from one to the next, and the actions in one of them."""
    schedule = build_schedule(kind, ranks=ranks, micro_batches=micro_batches)
    costs = [
        StageCosts.uniform(schedule.num_stages, Durations(1.0, 1.0, 1.0 + step / times), TRANSFER)
        for step in range(times)
    ]
    seconds = best_seconds(lambda: [simulate(schedule, each).step_time_s for each in costs])
    return seconds, sum(map(len, schedule.ranks))


SIMULATED: tuple[tuple[ScheduleKind, int, int, int, str], ...] = (
    # kind, ranks, micro-batches, times, seconds allowed
    ("1f1b", 64, 512, 1, "0.2"),
    ("zb-h2", 64, 512, 1, ""),
    ("zb-v", 64, 512, 1, ""),
    ("1f1b", 8, 32, 1000, "2"),
    ("zb-h2", 8, 32, 1000, "2"),
    ("zb-v", 8, 32, 1000, "2"),
)


def main() -> None:
    print(f"Python {platform.python_version()} on one core, best of {ROUNDS} rounds\n")
    print("| what | actions | CPU seconds | limit | per action |")
    print("|---|---:|---:|---:|---:|")
    for kind, ranks, micro_batches, times, limit in SIMULATED:
        seconds, actions = simulation(kind, ranks, micro_batches, times)
        often = f", {times} times" if times > 1 else ""
        print_row(f"simulate {kind}, {ranks} x {micro_batches}{often}", actions * times, seconds, limit)
    for kind in ("1f1b", "zb-h2", "zb-v"):
        schedule = build_schedule(kind, ranks=64, micro_batches=512)
        actions = sum(map(len, schedule.ranks))
        written = best_seconds(partial(build_schedule, kind, ranks=64, micro_batches=512))
        print_row(f"write {kind}, 64 x 512", actions, written)
        print_row(f"check {kind}, 64 x 512", actions, best_seconds(partial(check_schedule, schedule)))


def print_row(what: str, actions: int, seconds: float, limit: str = "") -> None:
    print(f"| {what} | {actions:,} | {seconds:.3f} | {limit} | {seconds / actions * 1e6:.2f} µs |")


if __name__ == "__main__":
    main()
