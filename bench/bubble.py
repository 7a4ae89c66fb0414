"""The pipeline's bubble against its formula, (p-1)/(p-1+m), with real processes and messages and waits in place of compute.

    python bench/bubble.py [--steps N] [--markdown docs/measured/claims.md] [--svg docs/measured/bubble.svg]

Eight processes run 1F1B tables of 4 to 64 micro-batches as `bench/rehearsal.py` does: a forward waits 5 ms, a backward
10 ms, and a message is 4 KiB. The bubble is what ranks idle of the step, on average over ranks.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import click
import torch
from rich.console import Console

from claims_picture import Line, lines_svg
from rehearsal import RANKS, closed_form, in_processes, rehearse, with_section
from triaxial.files import write_atomically
from triaxial.plan.pipeline.schedule import Schedule, build_schedule

MICRO_BATCHES = (4, 8, 16, 32, 64)
MESSAGE_BYTES = 4096
LEFT, RIGHT, TOP, HEIGHT = 64, 72, 40, 300
HIGHEST = 0.8
"""Share at the top of the chart."""


@dataclass(frozen=True)
class Row:
    """One number of micro-batches."""

    schedule: Schedule
    step_s: float
    bubble: float
    """Median over steps."""

    @property
    def formula(self) -> float:
        form = closed_form(self.schedule)
        assert form is not None
        return form


def run_all(steps: int) -> list[Row]:
    schedules = [build_schedule("1f1b", ranks=RANKS, micro_batches=count) for count in MICRO_BATCHES]
    _, measured = in_processes(RANKS, rehearse, schedules, MESSAGE_BYTES, steps)
    return [
        Row(
            schedule,
            statistics.median(timeline.step_time_s for timeline in timelines),
            statistics.median(timeline.bubble_fraction for timeline in timelines),
        )
        for schedule, timelines in zip(schedules, measured, strict=True)
    ]


def report(rows: Sequence[Row], steps: int) -> str:
    """The section of docs/measured/claims.md."""
    lines = [
        f"`python bench/bubble.py` on {date.today()}, {os.cpu_count()} cores, Linux {platform.release()}, torch "
        f"{torch.__version__}: 1F1B on {RANKS} processes, a forward 5 ms and a backward 10 ms of waiting, real messages of "
        f"4 KiB, median of {steps} steps.",
        "",
        "| micro-batches m | step | bubble measured | (p-1)/(p-1+m) | difference |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.schedule.num_micro_batches} | {row.step_s * 1e3:.1f} ms | {row.bubble:.1%} | {row.formula:.1%} "
        f"| {(row.bubble - row.formula) * 100:+.1f} points |"
        for row in rows
    ]
    worst = max(abs(row.bubble - row.formula) for row in rows)
    return "\n".join([*lines, "", f"Largest difference: {worst * 100:.1f} points."]) + "\n"


def chart(rows: Sequence[Row]) -> str:
    counts = [f"m = {row.schedule.num_micro_batches}" for row in rows]
    line = Line(f"1F1B, {RANKS} ranks", [row.bubble for row in rows], [row.formula for row in rows])
    return lines_svg("Bubble, share of the step", counts, [line])


@click.command()
@click.option("--steps", default=5, show_default=True, help="steps of each table, of which the median counts")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="write a picture")
@click.option("--markdown", type=click.Path(path_type=Path), help="put the table between the file's bubble marks")
def main(steps: int, svg: Path | None, markdown: Path | None) -> None:
    """Hold the pipeline's bubble against its formula."""
    rows = run_all(steps)
    text = report(rows, steps)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if markdown:
        write_atomically(markdown, with_section(markdown, "bubble", text))
    if svg:
        write_atomically(svg, chart(rows))


if __name__ == "__main__":
    main()
