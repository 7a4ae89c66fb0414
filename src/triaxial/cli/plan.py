"""`triaxial plan`: the best layouts for a workload, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click

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
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.search.explain import why_not
from triaxial.plan.search.plan import OBJECTIVES, TrainingPlan, plan_training
from triaxial.plan.workload import Training
from triaxial.report.tables import plans_table


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
