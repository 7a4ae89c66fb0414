"""`triaxial plan`: the best layouts for a workload, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import Progress

from triaxial.cli.options import (
    WorkloadGroup,
    as_json,
    console,
    model_and_cluster,
    parse_count,
    print_json,
    training_work,
)
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.files import write_atomically
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.search.explain import why_not
from triaxial.plan.search.plan import OBJECTIVES, TrainingPlan, plan_training
from triaxial.plan.serving.demand import Objective, demand_for, serving_work, with_price
from triaxial.plan.serving.engine import SERVERS
from triaxial.plan.serving.search.plan import plan_serving
from triaxial.plan.workload import Training
from triaxial.report.frontier import frontier_table
from triaxial.report.serving_page import serving_page, serving_plans_table
from triaxial.report.tables import plans_table

PLANNED = [name for name, engine in SERVERS.items() if engine.chunked_prefill and not engine.reserves_outputs]
"""Engines that work as the simulation does."""


@dataclass(frozen=True)
class Question:
    """What `plan` was asked about, before the workload is known."""

    model: ModelSpec
    cluster: Cluster


@click.group(name="plan", cls=WorkloadGroup)
@model_and_cluster
@click.pass_context
def command(
    ctx: click.Context, model: str, cluster: str, inter: str | None, intra: str | None, gpu_price: float | None
) -> None:
    """Find the best layout of MODEL on a cluster."""
    ctx.obj = Question(
        load_model_spec(model), load_cluster(cluster, inter=inter, intra=intra, gpu_price_per_hour=gpu_price)
    )


@command.command()
@training_work
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="How many layouts to show.")
@click.option("--objective", default="time", show_default=True, type=click.Choice(OBJECTIVES), help="What is best.")
@click.option("--within", default=5.0, show_default=True, help="With --objective memory: % slower than the fastest.")
@click.option("--tokens", help="Length of the whole training, like 15T: says days and GPU-hours.")
@click.option("--why-not", "rival", help="Say why not this layout, like tp=16 (the rest as in the winner).")
@click.option("--flips/--no-flips", default=None, help="Find what would change the winner. Default: up to 64 GPUs.")
@as_json
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures.")
@click.pass_obj
def train(
    question: Question,
    global_batch: int,
    seq_len: int,
    precision: str,
    optimizer: str,
    top: int,
    objective: str,
    within: float,
    tokens: str | None,
    rival: str | None,
    flips: bool | None,
    json_out: bool,
    out: Path | None,
    html: Path | None,
) -> None:
    """Rank the layouts of a training step."""
    work = Training(global_batch=global_batch, seq_len=seq_len, precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    made = plan_training(
        question.model,
        question.cluster,
        work,
        top=top,
        objective=objective,
        within=within / 100,
        tokens=parse_count(tokens) if tokens else None,
        flips=flips,
    )
    answer = why_not(rival, made.plans[0], question.model, made.cluster, work) if rival else None
    document = made.to_dict() | ({"why_not": answer} if answer else {})
    if out:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if html:
        from triaxial.report.plan_page import plan_page

        html.write_text(plan_page(made), encoding="utf-8")
    if json_out:
        print_json(document)
    else:
        _print(made, answer)


def _print(made: TrainingPlan, answer: str | None) -> None:
    console().print(plans_table(made.plans))
    if run := made.whole_run:
        price = f", {run['cost']:,.0f} in money" if "cost" in run else ""
        click.echo(
            f"- {run['tokens']:.3g} tokens take {run['days']:,.1f} days, {run['gpu_hours']:,.0f} GPU-hours{price}."
        )
    for sentence in made.why.sentences:
        click.echo(f"- {sentence}")
    if answer:
        click.echo(f"- {answer}")


@command.command()
@click.option("--input", "input_len", help="Tokens of a prompt: 1024, or lognormal:MEAN:SIGMA.")
@click.option("--output", "output_len", help="Tokens of an answer, likewise.")
@click.option(
    "--lengths", type=click.Path(path_type=Path), help="Lengths from a JSONL file: input_tokens, output_tokens."
)
@click.option("--trace", type=click.Path(path_type=Path), help="Arrivals and lengths from a CSV file.")
@click.option("--rate", type=float, help="Requests per second, by chance (a trace is played faster or slower).")
@click.option(
    "--requests", default=1000, show_default=True, type=click.IntRange(20, 100_000), help="How many to simulate."
)
@click.option("--ttft", "ttft_s", type=float, help="Target: seconds to the first token for nine requests in ten.")
@click.option("--tpot", "tpot_s", type=float, help="Target: seconds per further token, likewise.")
@click.option(
    "--objective", default="throughput", show_default=True, type=click.Choice(get_args(Objective)), help="What is best."
)
@click.option("--precision", default="bf16", show_default=True, help="Weights: bf16, fp16, fp8, int8, int4 or fp4.")
@click.option("--kv-precision", default="bf16", show_default=True, help="Keys and values: bf16, fp16, fp8, int8, int4.")
@click.option("--engine", type=click.Choice(PLANNED), default="vllm", show_default=True, help="Whose host times.")
@click.option("--price", type=float, help="Price of one GPU for an hour: says the cost of a million tokens.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 100), help="How many layouts to show.")
@click.option("--flips/--no-flips", default=True, show_default=True, help="Find what would change the winner.")
@as_json
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures.")
@click.pass_obj
def serve(
    question: Question,
    /,
    objective: Objective,
    precision: str,
    kv_precision: str,
    engine: str,
    price: float | None,
    top: int,
    flips: bool,
    json_out: bool,
    out: Path | None,
    html: Path | None,
    **asked: Any,
) -> None:
    """Find how many GPUs, split how, serve some traffic within its targets."""
    demand = demand_for(**asked)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("simulating", total=None)
        made = plan_serving(
            question.model,
            with_price(question.cluster, price),
            serving_work(demand, precision, kv_precision),
            demand,
            objective,
            engine=SERVERS[engine],
            top=top,
            flips=flips,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    document = made.to_dict()
    if out:
        write_atomically(out, json.dumps(document, indent=2) + "\n")
    if html:
        write_atomically(html, serving_page(made))
    if json_out:
        print_json(document)
        return
    console().print(serving_plans_table(made.plans))
    for sentence in made.why.sentences:
        click.echo(f"- {sentence}")
    console().print(frontier_table(made.frontier))
