"""`triaxial rehearse`: a plan's step on this machine, with waits in place of compute and real messages."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from triaxial.cli.options import as_json, console, print_json
from triaxial.plan.layout import parse_layout
from triaxial.plan.search.saved import read_saved_plan


@click.command(name="rehearse")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--layout", help="Another layout for the plan's cluster.  [default: the plan's best that can run]")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="After one to warm up.")
@click.option(
    "--dilation",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds here for one of the cluster.  [default: what makes waits and messages long enough]",
)
@as_json
def command(plan: Path, layout: str | None, steps: int, dilation: float | None, json_out: bool) -> None:
    """Rehearse the training step of PLAN, which `triaxial plan ... train --out PLAN` wrote.

    Every rank is a process that waits as long as its computation is predicted to take, and exchanges real messages over
    links that are to each other as the cluster's are. Needs root and iproute2.
    """
    saved = read_saved_plan(plan)
    from triaxial.measure.rehearsal import rehearse
    from triaxial.measure.script import write_script
    from triaxial.report.rehearsal_text import rehearsal_document, rehearsal_table, rehearsal_text, script_text
    from triaxial.train.planned import first_runnable

    chosen = parse_layout(layout) if layout else first_runnable(saved.layouts, saved.model)
    script = write_script(saved.model, saved.cluster, saved.training, chosen, dilation)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("rehearsing", total=steps + 1)
        found = rehearse(script, steps, tell=lambda: bar.advance(task))
    if json_out:
        print_json(rehearsal_document(found, saved.cluster))
        return
    click.echo(script_text(script, saved.cluster))
    console().print(rehearsal_table(found))
    click.echo(rehearsal_text(found))
