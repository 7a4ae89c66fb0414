"""Whole-machine training throughput: Triaxial beside plain PyTorch, the same model, data and arithmetic in one run.

    python bench/training.py [--precision fp32|bf16|all] [--only TEXT] [--json FILE] [--markdown FILE]

The model is a 34M-parameter Llama (hidden 512, 8 layers, 8 heads, ffn 1408, vocabulary 8192) at sequence length 512,
global batch 8, micro-batch 1. Every configuration runs in fresh processes over Gloo, Triaxial and its peer one after
the other so that drift of the machine meets both; a step's time is the slowest rank's, and the median of the measured
steps counts. The peers are described in `peers.py` and `peer_pipelines.py`. All contestants start from the same values
and see the same tokens: `loss` and `grad_norm` in the JSON must agree within a precision.

A configuration is measured for `--steps` steps, or for as many, at least two, as its share of `--minutes` allows.

"of ours" and "of own" are parallel efficiency: tokens/s over twice the rate of one process with one thread, Triaxial's
or the contestant's own. With more processes than two, the same two cores are shared.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from ours import run_ours
from peer_pipelines import run_pipeline
from peers import run_ddp, run_fsdp2, run_plain, run_tp
from triaxial import BadInput
from triaxial.parallel.program import check_runnable
from triaxial.plan.layout import check_layout, parse_layout
from workload import GLOBAL_BATCH, SEQ_LEN, SPEC, Limits, Outcome, run_world

Contestant = Callable[[int, str, str, Limits], Outcome]
ONE_THREAD = "1 process, 1 thread"


@dataclass(frozen=True)
class Row:
    """One configuration: a layout of ours and, where PyTorch has one, its peer."""

    name: str
    layout: str
    peer_name: str = ""
    peer: Contestant | None = None
    what: str = ""
    """Told to the peer."""
    threads: int = 1


ROWS = (
    Row(ONE_THREAD, "tp=1", "nn.Module", run_plain),
    Row("1 process, 2 threads", "tp=1", "nn.Module", run_plain, threads=2),
    Row("tp=2", "tp=2", "DTensor TP", run_tp),
    Row("tp=2, sp", "tp=2,sp=1", "DTensor TP + SP", run_tp, "sp"),
    Row("pp=2, 1f1b", "pp=2", "Schedule1F1B", run_pipeline, "1f1b"),
    Row("pp=2, interleaved", "pp=2,vpp=2,schedule=interleaved", "Interleaved1F1B", run_pipeline, "interleaved"),
    Row("pp=2, zb-h1", "pp=2,schedule=zb-h1", "InterleavedZeroBubble", run_pipeline, "zb-h1"),
    Row("pp=2, zb-v", "pp=2,vpp=2,schedule=zb-v", "ZBVZeroBubble", run_pipeline, "zb-v"),
    Row("dp=2", "dp=2", "DDP", run_ddp),
    Row("dp=2, zero=1", "dp=2,zero=1"),
    Row("dp=2, zero=2", "dp=2,zero=2", "FSDP2, no reshard", run_fsdp2, "zero-2"),
    Row("dp=2, zero=3", "dp=2,zero=3", "FSDP2", run_fsdp2, "zero-3"),
    Row("tp=2, pp=2", "tp=2,pp=2", "DTensor TP + 1F1B", run_pipeline, "1f1b"),
    Row("tp=2, dp=2", "tp=2,dp=2"),
    Row("tp=2, pp=2, dp=2", "tp=2,pp=2,dp=2"),
)


@dataclass(frozen=True)
class Result:
    """One contestant in one row."""

    row: str
    by: str
    """Triaxial, or the peer's name."""
    precision: str
    processes: int
    threads: int
    outcome: Outcome

    @property
    def tokens_per_s(self) -> float:
        return self.outcome.tokens_per_s


@dataclass(frozen=True)
class Task:
    row: Row
    precision: str
    is_ours: bool

    @property
    def by(self) -> str:
        return "triaxial" if self.is_ours else self.row.peer_name

    def run(self, limits: Limits) -> Result:
        row, layout = self.row, parse_layout(self.row.layout)
        contestant, what = (run_ours, row.layout) if self.is_ours or row.peer is None else (row.peer, row.what)
        outcome = run_world(contestant, what, self.precision, limits, processes=layout.world_size, threads=row.threads)
        return Result(row.name, self.by, self.precision, layout.world_size, row.threads, outcome)


def refusal(row: Row) -> str | None:
    """Why our runtime does not run a row; None if it does."""
    try:
        layout = parse_layout(row.layout)
        check_layout(layout, SPEC, SEQ_LEN)
        check_runnable(layout, SPEC)
    except BadInput as error:
        return str(error)
    return None


def tasks_of(rows: list[Row], precision: str) -> list[Task]:
    """Ours and the peer's in turn; one thread, which efficiency is relative to, both first and last."""
    return [
        Task(row, precision, is_ours)
        for row in (*rows, *(row for row in rows if row.name == ONE_THREAD))
        for is_ours in (True, False)
        if (refusal(row) is None if is_ours else row.peer is not None)
    ]


def run_all(tasks: list[Task], warmup: int, steps: int, seconds: float, console: Console) -> list[Result]:
    """Run the tasks one after the other, sharing the time that is left evenly among those that are left."""
    deadline, results = time.perf_counter() + seconds, []
    for i, task in enumerate(tasks):
        share = (deadline - time.perf_counter()) / (len(tasks) - i)
        try:
            result = task.run(Limits(warmup, steps, share))
        except Exception as error:  # one contestant that fails must not cost the others' figures
            console.print(f"[red]{task.precision} {task.row.name}, {task.by}: {type(error).__name__}: {error}")
            continue
        results.append(result)
        out = result.outcome
        console.print(
            f"[dim]{task.precision} {task.row.name}, {task.by}: {result.tokens_per_s:.0f} tokens/s, "
            f"{len(out.step_s)} steps, {out.cpu_s:.2f} s of processor a step, loss {out.loss:.4f}, "
            f"norm {out.grad_norm:.4f}"
        )
    return results


def merge_repeated(results: list[Result]) -> list[Result]:
    """One result of each configuration, with the steps of all its runs."""
    merged: dict[tuple[str, str, str], Result] = {}
    for r in results:
        key = r.precision, r.row, r.by
        if first := merged.get(key):
            r = replace(first, outcome=replace(first.outcome, step_s=first.outcome.step_s + r.outcome.step_s))
        merged[key] = r
    return list(merged.values())


COLUMNS = ("configuration", "by", "tokens/s", "of ours", "of own", "to peer", "peak MiB/rank", "bubble", "steps")


def cells(results: list[Result]) -> list[tuple[str, ...]]:
    """The table of one precision, a line per contestant."""
    ours = {r.row: r.tokens_per_s for r in results if r.by == "triaxial"}
    peers = {r.row: r.tokens_per_s for r in results if r.by != "triaxial"}
    lines = []
    for r in results:
        is_ours = r.by == "triaxial"
        base, own = ours.get(ONE_THREAD), (ours if is_ours else peers).get(ONE_THREAD)
        lines.append(
            (
                r.row if is_ours else "",
                r.by,
                f"{r.tokens_per_s:.0f}",
                _ratio(r.tokens_per_s / 2, base),
                _ratio(r.tokens_per_s / 2, own),
                _ratio(r.tokens_per_s, peers.get(r.row)) if is_ours else "",
                f"{r.outcome.peak_rss_bytes / 2**20:.0f}",
                "" if r.outcome.bubble is None else f"{r.outcome.bubble:.3f}",
                str(len(r.outcome.step_s)),
            )
        )
    return lines


def _ratio(value: float, over: float | None) -> str:
    return f"{value / over:.2f}" if over else ""


def machine() -> str:
    """The machine and versions, in words."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if info.exists() and names else platform.processor()
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def rich_table(title: str, lines: list[tuple[str, ...]]) -> Table:
    table = Table(title=title)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(title: str, lines: list[tuple[str, ...]]) -> str:
    head = [f"### {title}", "", "| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines), ""])


@click.command()
@click.option("--precision", type=click.Choice(["fp32", "bf16", "all"]), default="all", show_default=True)
@click.option("--only", default="", metavar="TEXT", help="only rows whose name or layout holds TEXT")
@click.option("--steps", default=5, show_default=True, help="most steps measured of each configuration")
@click.option("--warmup", default=1, show_default=True, help="steps before those")
@click.option("--minutes", default=11.5, show_default=True, help="fewer steps are measured to stay within this")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), metavar="FILE")
def main(
    precision: str,
    only: str,
    steps: int,
    warmup: int,
    minutes: float,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Triaxial's training throughput beside plain PyTorch's."""
    console = Console(width=124, highlight=False)
    precisions = ["fp32", "bf16"] if precision == "all" else [precision]
    rows = [r for r in ROWS if r.name == ONE_THREAD or only in r.name or only in r.layout]
    for row in rows:
        if reason := refusal(row):
            console.print(f"ours does not run {row.name}: {reason}")
    tasks = [task for precision in precisions for task in tasks_of(rows, precision)]
    results = merge_repeated(run_all(tasks, warmup, steps, minutes * 60, console))

    titles = {p: f"{p}, {SPEC.name}, sequence {SEQ_LEN}, global batch {GLOBAL_BATCH}; {machine()}" for p in precisions}
    tables = {titles[p]: cells([r for r in results if r.precision == p]) for p in precisions}
    for title, lines in tables.items():
        console.print(rich_table(title, lines))
    if markdown_file:
        markdown_file.write_text("\n".join(markdown_table(title, lines) for title, lines in tables.items()))
    if json_file:
        records = [asdict(r) | {"tokens_per_s": r.tokens_per_s} for r in results]
        json_file.write_text(json.dumps({"machine": machine(), "results": records}, indent=1))


if __name__ == "__main__":
    main()
