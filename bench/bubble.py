"""The pipeline's bubble against its formula, (p-1)/(p-1+m), with real processes and messages and waits in place of compute.

    python bench/bubble.py [--steps N] [--markdown docs/measured/claims.md] [--svg docs/measured/bubble.svg]

Eight processes run 1F1B tables of 4 to 64 micro-batches as `bench/rehearsal.py` does: a forward waits 5 ms, a backward
10 ms, and a message is 4 KiB. The bubble is what ranks idle of the step, on average over ranks.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree.ElementTree import SubElement, tostring

import torch
from rich.console import Console

from rehearsal import RANKS, closed_form, in_processes, rehearse, with_section
from triaxial.files import write_atomically
from triaxial.plan.pipeline.schedule import Schedule, build_schedule
from triaxial.report.svg import FAINT, PALETTE, WIDTH, picture, write

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
    """The formula as a line, what was measured as dots; micro-batches by their logarithm."""
    svg = picture(f"Bubble of 1F1B on {RANKS} ranks", TOP + HEIGHT + 44)

    def place(count: int, share: float) -> tuple[float, float]:
        along = math.log2(count / MICRO_BATCHES[0]) / math.log2(MICRO_BATCHES[-1] / MICRO_BATCHES[0])
        return LEFT + 20 + along * (WIDTH - LEFT - RIGHT - 40), TOP + HEIGHT * (1 - share / HIGHEST)

    for share in (0.0, 0.2, 0.4, 0.6, HIGHEST):
        y = place(4, share)[1]
        line = {"x1": str(LEFT), "x2": str(WIDTH - RIGHT), "y1": f"{y:.1f}", "y2": f"{y:.1f}", "stroke": "#e5e7eb"}
        SubElement(svg, "line", line)
        write(svg, f"{share:.0%}", 24, y + 4, fill=FAINT)
    points = [place(row.schedule.num_micro_batches, row.formula) for row in rows]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    SubElement(svg, "polyline", {"points": path, "fill": "none", "stroke": PALETTE[0], "stroke-width": "2"})
    for row in rows:
        x, y = place(row.schedule.num_micro_batches, row.bubble)
        SubElement(svg, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "5", "fill": PALETTE[1]})
        write(svg, f"{row.bubble:.1%}", x + 9, y - 6)
        write(svg, f"m = {row.schedule.num_micro_batches}", x - 16, TOP + HEIGHT + 20, fill=FAINT)
    write(svg, "line: (p-1)/(p-1+m), dots: measured", LEFT, TOP + HEIGHT + 38, fill=FAINT)
    return tostring(svg, encoding="unicode")


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold the pipeline's bubble against its formula.")
    parser.add_argument("--steps", type=int, default=5, help="steps of each table, of which the median counts")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between the file's bubble marks")
    options = parser.parse_args()
    rows = run_all(options.steps)
    text = report(rows, options.steps)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if options.markdown:
        write_atomically(options.markdown, with_section(options.markdown, "bubble", text))
    if options.svg:
        write_atomically(options.svg, chart(rows))


if __name__ == "__main__":
    main()
