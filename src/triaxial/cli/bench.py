"""`triaxial bench`: layouts run for real, predicted beside measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from triaxial import BadInput, NoAnswer
from triaxial.cli.options import Command, as_json, console, print_json
from triaxial.cluster.spec import LOCAL, Cluster, load_cluster
from triaxial.files import require_free, write_atomically
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout, parse_layout
from triaxial.plan.serving.workload import Serving
from triaxial.plan.workload import Training

if TYPE_CHECKING:
    from rich.table import Table

    from triaxial.measure.bench import Bench


class BenchGroup(click.Group):
    """`bench MODEL [train|serve] --options`: without a word it is training."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in ctx.help_option_names:
            word = next((arg for arg in args if arg in self.commands), "train")
            at = args.index(word) if word in args else len(args)
            args = [word, *args[:at], *args[at + 1 :]]
        return super().parse_args(ctx, args)


@click.group(name="bench", cls=BenchGroup, subcommand_metavar="MODEL [train|serve] [OPTIONS]")
def command() -> None:
    """Run MODEL under each layout, in fresh processes, and compare with the planner: training unless told otherwise."""


def benched(command: Command) -> Command:
    """What every bench is told."""
    for decorate in reversed(
        (
            click.argument("model"),
            click.option(
                "--cluster", default=LOCAL, show_default=True, help="As for plan; local is what `triaxial probe` wrote."
            ),
            click.option("--layouts", default="all", show_default=True, help="`all`, or some like 'tp=2,pp=2 dp=4'."),
            as_json,
        )
    ):
        command = decorate(command)
    return command


@command.command()
@benched
@click.option("--global-batch", type=int, default=8, show_default=True, help="Sequences per step.")
@click.option("--seq-len", type=int, default=256, show_default=True, help="Tokens per sequence.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Of each layout.")
@click.option("--data", type=click.Path(path_type=Path), help="Text.  [default: Python's own library]")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the runs and bench.json in this folder.")
def train(
    model: str,
    cluster: str,
    layouts: str,
    out: Path | None,
    json_out: bool,
    steps: int,
    data: Path | None,
    **work: Any,
) -> None:
    """Train for a few steps: seconds of a step, memory, bubble."""
    from triaxial.measure.bench_training import bench_training, training_layouts
    from triaxial.report.bench_table import training_document, training_table

    machine, training = load_cluster(cluster), Training(**work)
    _require_free(out)
    chosen = _chosen(layouts, lambda: training_layouts(load_model_spec(model), machine, training), machine)
    with tempfile.TemporaryDirectory(prefix="triaxial-bench-") as scratch:
        found = bench_training(
            model, machine, training, chosen, steps=steps, out=out or Path(scratch), data=data, tell=_teller(chosen)
        )
    _show(found, training_table(found), training_document(found), out, json_out)


@command.command()
@benched
@click.option("--input", "input_len", type=int, default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--output", "output_len", type=int, default=32, show_default=True, help="Tokens of an answer.")
@click.option("--concurrency", type=int, default=1, show_default=True, help="Clients that ask again when answered.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="bf16", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The median of so many is shown.")
@click.option("--out", type=click.Path(path_type=Path), help="Write bench.json in this folder.")
def serve(model: str, cluster: str, layouts: str, out: Path | None, json_out: bool, rounds: int, **work: Any) -> None:
    """Serve requests: TTFT, TPOT, output tokens per second, memory."""
    from triaxial.measure.bench_serving import bench_serving, serving_layouts
    from triaxial.report.bench_serving_table import serving_document, serving_table

    machine, serving = load_cluster(cluster), Serving(**work, kv_precision=work["precision"])
    _require_free(out)
    chosen = _chosen(layouts, lambda: serving_layouts(model, machine, serving), machine)
    found = bench_serving(model, machine, serving, chosen, rounds=rounds, tell=_teller(chosen))
    _show(found, serving_table(found), serving_document(found), out, json_out)


def _require_free(out: Path | None) -> None:
    if out is not None:
        require_free(out, "another --out")


def _chosen(layouts: str, legal: Callable[[], list[Layout]], cluster: Cluster) -> list[Layout]:
    if not layouts.strip():
        raise BadInput("name layouts like 'tp=2,pp=2 dp=4', or leave --layouts out")
    if layouts != "all":
        return [parse_layout(text) for text in dict.fromkeys(layouts.split())]
    if not (chosen := legal()):
        raise NoAnswer(f"no layout over all {cluster.num_gpus} ranks of {cluster.name} can run this model and work")
    return chosen


def _teller(chosen: Sequence[Layout]) -> Callable[[Layout], None]:
    return lambda layout: click.echo(f"{layout} ({chosen.index(layout) + 1} of {len(chosen)})", err=True)


def _show(found: Bench[Any, Any], table: Table, document: dict[str, Any], out: Path | None, json_out: bool) -> None:
    from triaxial.report.bench_table import verdict

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "bench.json", json.dumps(document, indent=2) + "\n")
    if json_out:
        print_json(document)
    else:
        console().print(table)
        click.echo(verdict(found))
    if not found.measured:
        raise NoAnswer("no layout has run")
