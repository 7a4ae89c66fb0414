"""`triaxial bench`: layouts run for real, predicted beside measured."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from triaxial.cli.options import as_json, console, print_json
from triaxial.cluster.spec import LOCAL, load_cluster
from triaxial.files import write_atomically
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.workload import Training


@click.command(name="bench")
@click.argument("model")
@click.option("--cluster", default=LOCAL, show_default=True, help="As for plan; local is what `triaxial probe` wrote.")
@click.option("--layouts", default="all", show_default=True, help="`all`, or some like 'tp=2,pp=2 dp=4'.")
@click.option("--global-batch", type=int, default=8, show_default=True, help="Sequences per step.")
@click.option("--seq-len", type=int, default=256, show_default=True, help="Tokens per sequence.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Of each layout.")
@click.option("--data", type=click.Path(path_type=Path), help="Text.  [default: Python's own library]")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the runs and bench.json in this folder.")
@as_json
def command(
    model: str,
    cluster: str,
    layouts: str,
    global_batch: int,
    seq_len: int,
    precision: str,
    steps: int,
    data: Path | None,
    out: Path | None,
    json_out: bool,
) -> None:
    """Train MODEL for a few steps under each layout, in fresh processes, and compare with the planner."""
    from triaxial.measure.bench import all_layouts, run_bench
    from triaxial.report.bench_table import bench_document, bench_table

    machine, work = load_cluster(cluster), Training(global_batch=global_batch, seq_len=seq_len, precision=precision)  # type: ignore[arg-type]
    chosen = [parse_layout(text) for text in layouts.split()] if layouts != "all" else None
    chosen = chosen or all_layouts(load_model_spec(model), machine, work)
    with tempfile.TemporaryDirectory(prefix="triaxial-bench-") as scratch:
        found = run_bench(
            model,
            machine,
            work,
            chosen,
            steps=steps,
            out=out or Path(scratch),
            data=data,
            tell=lambda layout: click.echo(f"{layout} ({chosen.index(layout) + 1} of {len(chosen)})", err=True),
        )
    if out is not None:
        write_atomically(out / "bench.json", json.dumps(bench_document(found), indent=2) + "\n")
    if json_out:
        print_json(bench_document(found))
        return
    console().print(bench_table(found))
    if found.regret is not None:
        click.echo(f"regret of the planner's choice: {found.regret:.1%}")
    if found.rank_correlation is not None:
        click.echo(f"Kendall's tau of predicted and measured: {found.rank_correlation:.2f}")
