"""How fast schedules are simulated, and what the executor adds to an action. Prints one Markdown table: `python bench/schedules.py`."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from triaxial.parallel.mesh import Axis
from triaxial.parallel.pipeline import Pipeline
from triaxial.plan.pipeline.schedule import Durations, ScheduleKind, build_schedule
from triaxial.plan.pipeline.simulate import StageCosts, Transfer, simulate
from triaxial.plan.pipeline.timeline import Span
from triaxial.plan.pipeline.validity import check_schedule

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


class Nothing:
    """A stage that takes no time."""

    y = torch.zeros(1)

    def forward(self, micro_batch: int, x: Tensor | None, *, train: bool) -> Tensor:
        return self.y

    def backward(self, micro_batch: int, dy: Tensor | None, *, last: bool) -> Tensor | None:
        return self.y

    def backward_input(self, micro_batch: int, dy: Tensor | None) -> Tensor | None:
        return self.y

    def backward_weight(self, micro_batch: int, *, last: bool) -> None:
        pass


def executor() -> tuple[int, float, float]:
    """Actions of one rank that sends nothing, seconds of running them, and seconds of recording them alone."""
    schedule = build_schedule("zb-v", ranks=1, micro_batches=512)
    stages = {0: Nothing(), 1: Nothing()}
    cpu = torch.device("cpu")
    pipeline = Pipeline(schedule, Axis("pp", (0,), 0), stages, message_shape=(1,), dtype=torch.float32, device=cpu)
    actions = schedule.ranks[0]

    def record() -> list[Span]:
        marks = [(time.perf_counter(), time.perf_counter()) for _ in actions]
        return [Span(action, begin, end) for action, (begin, end) in zip(actions, marks)]

    return len(actions), best_seconds(pipeline.run), best_seconds(record)


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
    actions, run_s, record_s = executor()
    print_row("execute actions that do nothing", actions, run_s)
    print_row("of which recording begin and end", actions, record_s)


def print_row(what: str, actions: int, seconds: float, limit: str = "") -> None:
    print(f"| {what} | {actions:,} | {seconds:.3f} | {limit} | {seconds / actions * 1e6:.2f} µs |")


if __name__ == "__main__":
    main()
