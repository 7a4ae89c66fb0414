"""Layouts of clusters of 16 and 32 GPUs rehearsed on this machine, beside what the planner expects of them.

    python bench/rehearse_layouts.py [--cluster 2x8xH100-SXM] [--steps N] [tp=8,pp=2 ...]

Every rank is a process; computation is waited for, messages are real, time is dilated (`triaxial rehearse`). Prints the
step time and its parts, predicted and rehearsed, and whether the ranking is the same. Root and iproute2 needed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date

import click
import torch
from rich.console import Console

from triaxial.cluster.spec import load_cluster
from triaxial.measure.rehearsal import PARTS, Rehearsal, rehearse
from triaxial.measure.script import write_script
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.validation.accuracy import kendall_tau
from triaxial.plan.workload import Training

CASES = {
    "2x8xH100-SXM": ("llama-3.1-8b", Training(global_batch=16, seq_len=4096)),
    "4x8xH100-SXM": ("llama-3.1-70b", Training(global_batch=16, seq_len=4096)),
}
LAYOUTS = {
    "2x8xH100-SXM": (
        "tp=8,pp=2",
        "tp=4,pp=4",
        "tp=2,pp=8",
        "tp=2,pp=8,order=pp-cp-dp-tp",
        "tp=8,dp=2",
        "tp=2,dp=8,zero=1",
    ),
    "4x8xH100-SXM": ("tp=8,pp=4", "tp=4,pp=8"),
}


def report(cluster: str, rows: Sequence[Rehearsal]) -> str:
    """A table in Markdown, the fastest predicted layout first."""
    model, work = CASES[cluster]
    rows = sorted(rows, key=lambda row: row.script.predicted.step_time_s)
    lines = [
        f"`python bench/rehearse_layouts.py --cluster {cluster}` on {date.today()}, {os.cpu_count()} cores, Linux "
        f"{platform.release()}, torch {torch.__version__}: {model}, {work.global_batch} sequences of {work.seq_len} tokens a "
        f"step in {work.precision} on {cluster}, median of {len(rows[0].steps_s)} steps. Milliseconds of the cluster, "
        "predicted / rehearsed.",
        "",
        f"| layout | dilation | step | error | {' | '.join(part.replace('exposed_', '') for part in PARTS)} |",
        f"|---|---:|---:|---:|{'---:|' * len(PARTS)}",
    ]
    for row in rows:
        parts = [pair(row.predicted_s[part], row.parts_s[part]) for part in PARTS]
        step = pair(row.script.predicted.step_time_s, row.step_time_s)
        lines.append(
            f"| `{row.script.layout}` | {row.script.dilation:.1f} | {step} | {row.error:+.1%} | {' | '.join(parts)} |"
        )
    tau = kendall_tau([row.script.predicted.step_time_s for row in rows], [row.step_time_s for row in rows])
    return "\n".join([*lines, "", f"Kendall's tau of predicted and rehearsed steps: {tau:.2f}."]) + "\n"


def pair(predicted_s: float, rehearsed_s: float) -> str:
    return f"{predicted_s * 1e3:.1f} / {rehearsed_s * 1e3:.1f}"


@click.command()
@click.argument("layouts", nargs=-1, metavar="[LAYOUT]...")
@click.option("--cluster", type=click.Choice(list(CASES)), default="2x8xH100-SXM", show_default=True)
@click.option("--steps", default=2, show_default=True, help="steps of each layout, after one to warm up")
def main(layouts: Sequence[str], cluster: str, steps: int) -> None:
    """Rehearse the cluster's own layouts, or those given, and hold the planner's predictions against them."""
    model, work = CASES[cluster]
    rows = []
    for text in layouts or LAYOUTS[cluster]:
        script = write_script(load_model_spec(model), load_cluster(cluster), work, parse_layout(text))
        rows.append(rehearse(script, steps))
    Console().print(report(cluster, rows), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
