"""`triaxial estimate`: the price of one layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from triaxial.cli.options import WorkloadGroup, as_json, console, model_and_cluster, print_json, training_work
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import Layout, parse_layout
from triaxial.plan.serving.engine import SERVERS
from triaxial.plan.serving.estimate import estimate_serving
from triaxial.plan.serving.workload import Serving
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training
from triaxial.report.serving_table import serving_estimate_table
from triaxial.report.tables import estimate_table


@dataclass(frozen=True)
class Question:
    """What `estimate` was asked about, before the workload is known."""

    model: ModelSpec
    cluster: Cluster
    layout: Layout


@click.group(name="estimate", cls=WorkloadGroup)
@model_and_cluster
@click.option("--layout", required=True, help="Like tp=8,pp=4,dp=2,mb=1.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    cluster: str,
    inter: str | None,
    intra: str | None,
    gpu_price: float | None,
    layout: str,
) -> None:
    """Price one LAYOUT of MODEL on a cluster."""
    ctx.obj = Question(
        load_model_spec(model),
        load_cluster(cluster, inter=inter, intra=intra, gpu_price_per_hour=gpu_price),
        parse_layout(layout),
    )


@command.command()
@training_work
@as_json
@click.pass_obj
def train(question: Question, global_batch: int, seq_len: int, precision: str, optimizer: str, json_out: bool) -> None:
    """Price a training step."""
    work = Training(global_batch=global_batch, seq_len=seq_len, precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    priced = estimate(question.model, question.cluster, work, question.layout)
    if json_out:
        print_json(priced.to_dict())
    else:
        console().print(estimate_table(priced))


@command.command()
@click.option("--input", "input_len", type=int, required=True, help="Tokens of a prompt.")
@click.option("--output", "output_len", type=int, required=True, help="Tokens of an answer.")
@click.option("--rate", type=float, help="Requests per second over all replicas.")
@click.option("--concurrency", type=int, default=1, show_default=True, help="Clients that ask again, without --rate.")
@click.option("--precision", default="bf16", show_default=True, help="Weights: bf16, fp16, fp8, int8, int4 or fp4.")
@click.option("--kv-precision", default="bf16", show_default=True, help="Keys and values: bf16, fp16, fp8, int8, int4.")
@click.option("--max-batch", type=int, default=256, show_default=True, help="Sequences that a replica runs at a time.")
@click.option("--chunk-tokens", type=int, default=8192, show_default=True, help="Tokens of one step.")
@click.option("--engine", type=click.Choice(list(SERVERS)), default="vllm", show_default=True)
@as_json
@click.pass_obj
def serve(question: Question, /, engine: str, json_out: bool, **work: Any) -> None:
    """Price serving requests."""
    priced = estimate_serving(question.model, question.cluster, Serving(**work), question.layout, SERVERS[engine])
    if json_out:
        print_json(priced.to_dict())
    else:
        console().print(serving_estimate_table(priced))
