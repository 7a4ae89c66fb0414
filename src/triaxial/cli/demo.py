"""`triaxial demo`: the whole thing at work on this machine."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from triaxial.plan.layout import parse_layout


@click.command(name="demo")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the runs.  [default: runs/demo-TIME]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(out: Path | None, as_json: bool) -> None:
    """Train a small byte model on Python's own library, in one process and over 4 as TP x PP and TP x DP.

    Needs no network and no GPU. The loss curves must be the same; the largest difference is printed.
    """
    from triaxial.measure.demo import run_demo

    console = Console(stderr=True)
    out = out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    demo = run_demo(out, lambda layout: console.print(f"training tiny-byte as [bold]{layout}[/bold]"))
    if as_json:
        print(json.dumps(asdict(demo)))
        return
    table = Table(title="One model, one seed, three layouts", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("layout", "ranks", "first loss", "last loss", "tokens/s", "memory", "bubble"):
        table.add_column(title, justify="left" if title == "layout" else "right", no_wrap=True)
    for run in demo.runs:
        table.add_row(
            run.layout,
            str(parse_layout(run.layout).world_size),
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{run.tokens_per_s:,.0f}",
            f"{run.peak_memory_bytes / 2**20:,.0f} MiB",
            f"{run.bubble_fraction:.1%}",
        )
    printer = Console()
    printer.print(table)
    printer.print(f"Largest relative difference between the loss curves: {demo.largest_difference:.1e} (fp32)")
    printer.print(Panel(escape(demo.sample), title="What the trained model writes (greedy)", expand=False))
    printer.print(f"runs: {out}")
