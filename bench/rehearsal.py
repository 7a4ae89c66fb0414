"""Every schedule rehearsed by real processes and real messages, with waits in place of compute.

    python bench/rehearsal.py [--steps N] [--svg docs/measured] [--markdown docs/measured/schedules.md]

Eight processes run each schedule's table with 32 micro-batches; a forward waits 5 ms, an input gradient 5 ms, a weight
gradient 5 ms (a whole backward 10 ms), half of that on each of two stages of a rank. Messages travel through shared
memory, as between all pipeline ranks of one host without GPUs. The simulator predicts the same table with the same
durations and one further number: what a message costs, as measured in a pass of forwards alone. There the sender copies
a message itself, so the simulator's sender stands still meanwhile. The processes ask for real-time priority, since they
wait rather than compute and only lateness would spoil the picture. What is measured is the median of the steps by
duration.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click
import torch
import torch.distributed as dist
from rich.console import Console

from triaxial.files import write_atomically
from triaxial.parallel.emulated import EmulatedStage
from triaxial.parallel.mesh import Axis
from triaxial.parallel.pipeline import Pipeline
from triaxial.parallel.shared import SharedMemory
from triaxial.parallel.timeline import gather_timeline
from triaxial.plan.layout import ScheduleKind
from triaxial.plan.pipeline.schedule import Durations, Schedule, build_schedule
from triaxial.plan.pipeline.simulate import Simulation, StageCosts, Transfer, simulate
from triaxial.plan.pipeline.timeline import Timeline
from triaxial.report.timeline import timeline_svg

RANKS, MICRO_BATCHES = 8, 32
OF_RANK = Durations(5e-3, 5e-3, 5e-3)
KINDS: tuple[tuple[ScheduleKind, int], ...] = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("zb-h1", 1),
    ("zb-h2", 1),
    ("zb-v", 2),
)
MESSAGES = {"4 KiB": 4 * 1024, "1 MiB": 1024 * 1024}
CPU = torch.device("cpu")
START_S = 0.02
"""Until all other ranks wait for their first message."""

Steps = list[Timeline]


@dataclass(frozen=True)
class Row:
    """One schedule with one size of message."""

    message: str
    message_s: float
    """What one costs, as the forwards alone say."""
    schedule: Schedule
    predicted: Simulation
    measured: Timeline

    @property
    def error(self) -> float:
        """Of the simulator: measured over predicted step, less 1."""
        return self.measured.step_time_s / self.predicted.step_time_s - 1


def durations(schedule: Schedule) -> Durations:
    """Of one virtual stage."""
    part = schedule.num_ranks / schedule.num_stages
    return Durations(OF_RANK.forward * part, OF_RANK.input * part, OF_RANK.weight * part)


def closed_form(schedule: Schedule) -> float | None:
    """The published bubble fraction of the whole step where there is a formula."""
    p, m, v = schedule.num_ranks, schedule.num_micro_batches, schedule.num_stages // schedule.num_ranks
    match schedule.kind:
        case "gpipe" | "1f1b" | "interleaved":
            return (p - 1) / (p - 1 + m * v)
        case "zb-h1":  # (p - 1)(F + I - W) idle beside m (F + I + W)
            return (p - 1) / (p - 1 + 3 * m)
    return None


def be_punctual() -> None:
    """Waits must end on time whatever else the machine does: real-time priority, where that is permitted."""
    with suppress(PermissionError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))


def rehearse(rank: int, store: str, schedules: list[Schedule], num_bytes: int, steps: int) -> tuple[float, list[Steps]]:
    """One process: seconds of a message, and every step's timeline of every schedule."""
    be_punctual()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    axis = Axis("pp", tuple(range(RANKS)), rank, dist.group.WORLD)
    axis.shared = SharedMemory(dist.group.WORLD, axis.ranks, rank, None)

    def run(schedule: Schedule, times: int, train: bool = True) -> Steps:
        stages = {stage: emulated(schedule, num_bytes) for stage, at in enumerate(schedule.placement) if at == rank}
        shape = (num_bytes // 4,)
        pipeline = Pipeline(schedule, axis, stages, message_shape=shape, dtype=torch.float32, device=CPU)
        timelines = []
        for _ in range(times + 1):
            dist.barrier()
            if rank == 0:
                time.sleep(START_S)
            spans = pipeline.run(train=train)
            timelines.append(gather_timeline(schedule, axis, spans, CPU))
        return timelines[1:]  # the first one touches memory for the first time

    forwards = build_schedule("gpipe", ranks=RANKS, micro_batches=MICRO_BATCHES)
    turns = RANKS - 1 + MICRO_BATCHES
    passes_s = [forward_seconds(timeline) for timeline in run(forwards, steps, train=False)]
    message_s = statistics.median(passes_s) / turns - OF_RANK.forward
    timelines = [run(schedule, steps) for schedule in schedules]
    dist.destroy_process_group()
    return message_s, timelines


def emulated(schedule: Schedule, num_bytes: int) -> EmulatedStage:
    each = durations(schedule)
    return EmulatedStage(each.forward, each.input + each.weight, each.input, each.weight, (num_bytes // 4,))


def forward_seconds(timeline: Timeline) -> float:
    """From the first begin to the last end of the forwards; other actions did not run."""
    ends = [span.end_s for spans in timeline.ranks for span in spans if span.action.kind == "F"]
    return max(ends) - timeline.begin_s


def in_processes(count: int, function, *arguments):  # type: ignore[no-untyped-def]
    """`function(rank, store, *arguments)` in fresh processes; the first rank's answer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triaxial.parallel.pipeline"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(count, mp_context=context) as pool:
        store = str(Path(folder) / "store")
        futures = [pool.submit(function, rank, store, *arguments) for rank in range(count)]
        first, *_ = [future.result() for future in futures]
        return first


def run_all(steps: int) -> list[Row]:
    """Every schedule with every size of message."""
    schedules = [build_schedule(k, ranks=RANKS, micro_batches=MICRO_BATCHES, virtual_stages=v) for k, v in KINDS]
    rows = []
    for name, num_bytes in MESSAGES.items():
        message_s, measured = in_processes(RANKS, rehearse, schedules, num_bytes, steps)
        for schedule, timelines in zip(schedules, measured, strict=True):
            costs = StageCosts.uniform(schedule.num_stages, durations(schedule), Transfer(latency_s=message_s))
            middle = sorted(timelines, key=lambda timeline: timeline.step_time_s)[len(timelines) // 2]
            rows.append(Row(name, message_s, schedule, simulate(schedule, costs, sender_blocked=True), middle))
    return rows


def same_ranking(rows: list[Row]) -> bool:
    """Whether of any two schedules that the simulator tells apart by more than 1 %, the same one is faster."""
    return all(
        (a.predicted.step_time_s < b.predicted.step_time_s) == (a.measured.step_time_s < b.measured.step_time_s)
        for a, b in combinations(rows, 2)
        if abs(a.predicted.step_time_s / b.predicted.step_time_s - 1) > 0.01
    )


def report(rows: list[Row], steps: int) -> str:
    """The section of docs/measured/schedules.md."""
    costs = ", ".join(f"{name} {s * 1e6:.0f} µs" for name, s in {row.message: row.message_s for row in rows}.items())
    lines = [
        f"{datetime.date.today()}, {platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}: `python bench/rehearsal.py`, median of {steps} steps. A message costs {costs}.",
        "",
        "| message | schedule | predicted step | measured | difference | closed form | predicted bubble | measured |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        form = closed_form(row.schedule)
        lines.append(
            f"| {row.message} | {row.schedule.kind} | {row.predicted.step_time_s * 1e3:.1f} ms "
            f"| {row.measured.step_time_s * 1e3:.1f} ms | {row.error:+.1%} | {'' if form is None else f'{form:.1%}'} "
            f"| {row.predicted.timeline.bubble_fraction:.1%} | {row.measured.bubble_fraction:.1%} |"
        )
    worst = max(abs(row.error) for row in rows)
    distance = next(
        abs(row.measured.bubble_fraction - (closed_form(row.schedule) or 0.0))
        for row in rows
        if row.message == "4 KiB" and row.schedule.kind == "1f1b"
    )
    ranked = all(same_ranking([row for row in rows if row.message == name]) for name in MESSAGES)
    lines += [
        "",
        f"Largest difference of a step {worst:.1%} (aim 5 %); the measured ranking of the schedules is "
        f"{'the predicted one' if ranked else 'NOT the predicted one'}. The bubble of 1F1B with 4 KiB messages is "
        f"{distance * 100:.1f} points from its closed form (aim 2).",
    ]
    return "\n".join(lines) + "\n"


def with_section(path: Path, name: str, text: str) -> str:
    """The file's text with what stands between its marks of that name replaced; of a file without them, `text` alone."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in old or end not in old:
        return text
    return old[: old.index(begin) + len(begin)] + text + old[old.index(end) :]


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--steps", default=5, show_default=True, help="steps of each schedule, of which the median counts")
@click.option("--svg", type=PATH, metavar="FOLDER", help="one picture a schedule, predicted above measured")
@click.option("--markdown", type=PATH, metavar="FILE", help="put the table between the file's rehearsal marks")
def main(steps: int, svg: Path | None, markdown: Path | None) -> None:
    """Rehearse every schedule with waits in place of compute."""
    rows = run_all(steps)
    text = report(rows, steps)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if markdown:
        write_atomically(markdown, with_section(markdown, "rehearsal", text))
    if svg:
        svg.mkdir(parents=True, exist_ok=True)
        for row in rows:
            if row.message == "1 MiB":
                named = [("predicted", row.predicted.timeline), ("measured", row.measured)]
                write_atomically(svg / f"rehearsal-{row.schedule.kind}.svg", timeline_svg(named))


if __name__ == "__main__":
    main()
