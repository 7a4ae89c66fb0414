"""`triaxial validate`: predictions beside published measurements."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from triaxial import BadInput
from triaxial.cli.options import as_json, console, print_json
from triaxial.cli.validate_serving import report_logs, report_points
from triaxial.plan.validation.accuracy import (
    Errors,
    Prediction,
    by_source,
    constant_mfu,
    errors,
    predict,
    predict_left_out,
    ranking,
)
from triaxial.plan.validation.kinds import kind_of
from triaxial.plan.validation.published import Point, Skipped, read_points


@click.command(name="validate")
@click.option(
    "--csv", "files", multiple=True, type=click.Path(path_type=Path), help="Measured points, or a server log."
)
@as_json
def command(files: tuple[Path, ...], json_out: bool) -> None:
    """Hold predictions against every row of the CSV files; without --csv, against the training steps that ship."""
    kind = kind_of(files)
    if kind != "training steps":
        (report_points if kind == "serving points" else report_logs)(files, json_out)
        return
    points: list[Point] = []
    skipped: list[Skipped] = []
    for file in files or (_shipped(),):
        read, unread = read_points(file)
        points += read
        skipped += unread
    predictions, left_out = predict(points), predict_left_out(points)
    if not predictions:
        raise BadInput(f"no row can be predicted: {skipped[0].id}: {skipped[0].reason}")
    if json_out:
        print_json(_document(predictions, left_out, skipped))
    else:
        _print(predictions, left_out, skipped)


def _shipped() -> Path:
    return Path(str(resources.files("triaxial.plan.validation") / "published.csv"))


def _document(
    predictions: Sequence[Prediction], left_out: Sequence[Prediction], skipped: Sequence[Skipped]
) -> dict[str, Any]:
    order = ranking(predictions)
    return {
        "rows": [
            {
                "id": p.point.id,
                "source": p.point.source,
                "predicted": p.step_time_s,
                "measured": p.point.step_time_s,
                "relative_error": p.error,
                "relative_error_left_out": other.error,
                "layout": p.layout,
                "memory_gib": {"predicted": p.memory_gib, "measured": p.point.memory_gib},
            }
            for p, other in zip(predictions, left_out)
        ],
        "sources": {source: vars(errors(group)) for source, group in by_source(predictions).items()},
        "all": vars(errors(predictions)),
        "left_out": {
            "sources": {source: vars(errors(group)) for source, group in by_source(left_out).items()},
            "all": vars(errors(left_out)),
        },
        "constant_mfu": vars(errors(constant_mfu(predictions))),
        "memory": _memory_errors(predictions),
        "ranking": vars(order) if order else None,
        "skipped": [vars(row) for row in skipped],
    }


def _memory_errors(predictions: Sequence[Prediction]) -> dict[str, Any] | None:
    known = [p for p in predictions if p.memory_error is not None]
    return vars(errors(known, lambda p: p.memory_error or 0.0)) if known else None


def _print(predictions: Sequence[Prediction], left_out: Sequence[Prediction], skipped: Sequence[Skipped]) -> None:
    table = Table(
        title="Step time, relative error; each configuration once",
        caption="left out: with constants fitted without this source (sources of one laboratory together)",
        title_justify="left",
    )
    for heading in ("source", "count", "median", "90th pct", "mean", "bias", "left out: median", "mean", "bias"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    others = by_source(left_out)
    for source, group in by_source(predictions).items():
        table.add_row(source, *_figures(errors(group)), *_left_out_figures(errors(others[source])))
    table.add_section()
    table.add_row("all", *_figures(errors(predictions)), *_left_out_figures(errors(left_out)))
    table.add_row("constant MFU", "", *["", "", "", ""], *_left_out_figures(errors(constant_mfu(predictions))))
    console().print(table)
    if memory := _memory_errors(predictions):
        click.echo(
            f"Memory: {memory['count']} configurations, median {memory['median']:.1%}, bias {memory['bias']:+.1%}."
        )
    if order := ranking(predictions):
        click.echo(
            f"Ranking over {order.jobs} jobs: Kendall tau {order.tau:.2f} (median), regret {order.regret_median:.1%} "
            f"(median), {order.regret_mean:.1%} (mean), {order.regret_worst:.1%} (worst), best layout picked in "
            f"{order.best_picked:.0%}; a random pick regrets {order.random_regret:.0%}."
        )
    if skipped:
        click.echo(f"{len(skipped)} rows skipped, the first, {skipped[0].id}: {skipped[0].reason}")


def _figures(found: Errors) -> tuple[str, ...]:
    return (str(found.count), f"{found.median:.1%}", f"{found.p90:.1%}", f"{found.mape:.1%}", f"{found.bias:+.1%}")


def _left_out_figures(found: Errors) -> tuple[str, ...]:
    return (f"{found.median:.1%}", f"{found.mape:.1%}", f"{found.bias:+.1%}")
