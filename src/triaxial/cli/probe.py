"""`triaxial probe`: measure the devices and links of this cluster."""

from __future__ import annotations

from pathlib import Path

import click

from triaxial.cluster.spec import PROBED
from triaxial.plan.workload import Precision


@click.command(name="probe")
@click.option("--ranks", type=click.IntRange(1), help="Processes on this machine.  [default: its GPUs or cores]")
@click.option("--precision", "precisions", type=click.Choice(["fp32", "bf16"]), multiple=True, help="[default: both]")
@click.option("--out", type=click.Path(path_type=Path), default=PROBED, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(ranks: int | None, precisions: tuple[Precision, ...], out: Path, as_json: bool) -> None:
    """Measure what the devices and links of this cluster really do, and write a cluster file for `plan`.

    Starts ranks on this machine; run under torchrun on every node it measures the links between nodes too.
    """
    from triaxial.measure.probe_run import run_probe
    from triaxial.report.probe_text import probe_json, probe_text

    found = run_probe(ranks, precisions or ("fp32", "bf16"), out, as_json)
    if found is not None:
        click.echo(probe_json(found) if as_json else probe_text(found, out))
