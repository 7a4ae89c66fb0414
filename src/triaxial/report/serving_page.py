"""A plan for serving as a table for a terminal, and as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rich.table import Table

from triaxial.plan.serving.search.explain import request_seconds
from triaxial.plan.serving.search.option import Option
from triaxial.plan.serving.search.plan import ServingPlan
from triaxial.report.bars import stacked_bars
from triaxial.report.frontier import frontier_svg
from triaxial.report.plan_page import html_page

_HEADINGS = ("GPUs", "batch", "step", "TTFT p50/p90", "TPOT p50/p90", "tok/s", "tok/s/GPU", "decoding")


def serving_plans_table(plans: Sequence[Option]) -> Table:
    """The best deployments, best first."""
    table = Table()
    table.add_column("#", justify="right")
    table.add_column("layout", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, plan in enumerate(plans, start=1):
        table.add_row(str(rank), *_cells(plan))
    return table


def _cells(plan: Option) -> tuple[str, ...]:
    percentiles = zip(plan.served.at_percentile(50), plan.served.at_percentile(90))
    ttft, tpot = (f"{middle * 1e3:,.1f}/{high * 1e3:,.1f} ms" for middle, high in percentiles)
    return (
        f"tp={plan.layout.tp},pp={plan.layout.pp},dp={plan.layout.dp}",
        str(plan.gpus),
        str(plan.limits.max_batch),
        str(plan.limits.chunk_tokens),
        ttft,
        tpot,
        f"{plan.output_tokens_per_s:,.0f}",
        f"{plan.tokens_per_s_per_gpu:,.0f}",
        f"{plan.served.decode_batch:.0f}",
    )


def serving_page(plan: ServingPlan) -> str:
    """Write the page of a plan as HTML."""
    demand = plan.demand
    load = f"{demand.rate:.4g} requests per second" if demand.rate else "as many requests as it takes"
    labels = [f"tp={option.layout.tp},pp={option.layout.pp},dp={option.layout.dp}" for option in plan.plans]
    times = [request_seconds(option.candidate, option.served) for option in plan.plans]
    parts = list(dict.fromkeys(part for time in times for part in time))
    rows = [(label, {part: time.get(part, 0.0) for part in parts}) for label, time in zip(labels, times)]
    reasons = "".join(f"<li>{escape(sentence)}</li>" for sentence in plan.why.sentences)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("layout", *_HEADINGS))
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in _cells(option)) for option in plan.plans)
    table = f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
    return html_page(
        f"{plan.model.name} served on {plan.cluster.name}",
        f"<p>Prompts of {demand.mean_input:,.0f} and answers of {demand.mean_output:,.0f} tokens on average, {load}, in "
        f"{plan.work.precision}: the best of {plan.considered} ways to cut the model.</p>\n{table}\n<h2>Why</h2>\n"
        f"<ul>{reasons}</ul>\n{frontier_svg(plan.frontier)}\n{stacked_bars('Seconds of a mean request', 's', rows)}",
    )
