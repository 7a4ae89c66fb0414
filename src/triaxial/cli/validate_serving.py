"""What `triaxial validate` prints of serving measurements."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from triaxial import BadInput
from triaxial.cli.options import console, print_json
from triaxial.plan.validation.accuracy import Errors
from triaxial.plan.validation.published import Skipped
from triaxial.plan.validation.serving_accuracy import by_kind, by_source, errors, rank_layouts
from triaxial.plan.validation.serving_logs import LogErrors, read_log, replay_log
from triaxial.plan.validation.serving_points import ServedPoint, read_serving
from triaxial.plan.validation.serving_predict import Comparison, ServedPrediction, compare


def report_points(files: Sequence[Path], json_out: bool) -> None:
    """Static batches and closed loops: in sample, left out, and the baseline.

    Raises:
        BadInput: no row can be predicted.
    """
    points: list[ServedPoint] = []
    skipped: list[Skipped] = []
    for file in files:
        read, unread = read_serving(file)
        points += read
        skipped += unread
    if not points:
        raise BadInput(f"no row can be predicted: {skipped[0].id}: {skipped[0].reason}")
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("predicting", total=len(points))
        found = compare(points, progress=lambda done, total: bar.update(task, completed=done, total=total))
    if json_out:
        print_json(_document(found, skipped))
    else:
        _print(found, skipped)


def report_logs(files: Sequence[Path], json_out: bool) -> None:
    """Replayed logs of servers."""
    found = [error for file in files for error in replay_log(read_log(file))]
    if json_out:
        print_json({"logs": [{**vars(error), "error": error.error} for error in found]})
        return
    table = Table(title="Replayed logs, milliseconds", title_justify="left")
    for heading in ("log", "metric", "mean measured", "predicted", "error", "p90 measured", "predicted"):
        table.add_column(heading, justify="left" if heading in ("log", "metric") else "right")
    for error in found:
        table.add_row(*_log_row(error))
    console().print(table)


def _log_row(error: LogErrors) -> tuple[str, ...]:
    return (
        error.name,
        error.metric,
        f"{error.measured_mean:,.1f}",
        f"{error.predicted_mean:,.1f}",
        f"{error.error:+.1%}",
        f"{error.measured_p90:,.1f}",
        f"{error.predicted_p90:,.1f}",
    )


def _document(found: Comparison, skipped: Sequence[Skipped]) -> dict[str, Any]:
    rankings = _rankings(found.in_sample)
    return {
        "rows": [
            {
                "id": own.point.id,
                "source": own.point.source,
                "metric": own.metric,
                "predicted": own.predicted,
                "measured": own.measured,
                "relative_error": own.error,
                "relative_error_left_out": other.error,
                "layout": str(own.point.layout),
            }
            for own, other in zip(found.in_sample, found.left_out)
        ],
        "sources": _by_source(found.in_sample),
        "all": _by_kind(found.in_sample),
        "left_out": {"sources": _by_source(found.left_out), "all": _by_kind(found.left_out)},
        "roofline": {"sources": _by_source(found.baseline), "all": _by_kind(found.baseline)},
        "ranking": {name: vars(ranking) for name, ranking in rankings.items()},
        "skipped": [vars(row) for row in skipped],
    }


def _by_source(predictions: Sequence[ServedPrediction]) -> dict[str, Any]:
    return {f"{source} {kind}": vars(errors(group)) for (source, kind), group in by_source(predictions).items()}


def _by_kind(predictions: Sequence[ServedPrediction]) -> dict[str, Any]:
    return {kind: vars(errors(group)) for kind, group in by_kind(predictions).items()}


def _rankings(predictions: Sequence[ServedPrediction]) -> dict[str, Any]:
    found = {name: rank_layouts(predictions, per_gpu=name == "cost") for name in ("latency", "cost")}
    return {name: ranking for name, ranking in found.items() if ranking}


def _print(found: Comparison, skipped: Sequence[Skipped]) -> None:
    table = Table(
        title="Serving, relative errors",
        caption="left out: median with constants fitted without the source; roofline: median with one MFU and one MBU",
        title_justify="left",
    )
    for heading in ("source", "what", "count", "median", "p90", "bias"):
        table.add_column(heading, justify="left" if heading in ("source", "what") else "right", no_wrap=True)
    for heading in ("left out", "p90", "bias", "roofline"):
        table.add_column(heading, justify="right")
    others, baseline = by_source(found.left_out), by_source(found.baseline)
    for key, group in by_source(found.in_sample).items():
        table.add_row(*key, *_figures(errors(group), errors(others[key]), errors(baseline[key])))
    table.add_section()
    other_kinds, baseline_kinds = by_kind(found.left_out), by_kind(found.baseline)
    for kind, group in by_kind(found.in_sample).items():
        columns = _figures(errors(group), errors(other_kinds[kind]), errors(baseline_kinds[kind]))
        table.add_row("all", kind, *columns)
    console().print(table)
    for name, ranking in _rankings(found.in_sample).items():
        click.echo(
            f"Layouts of {ranking.jobs} jobs by {name}: Kendall tau {ranking.tau:.2f}, regret {ranking.regret_mean:.1%} "
            f"(mean), {ranking.regret_worst:.1%} (worst), best layout picked in {ranking.best_picked:.0%}."
        )
    if skipped:
        click.echo(f"{len(skipped)} rows skipped, the first, {skipped[0].id}: {skipped[0].reason}")


def _figures(own: Errors, other: Errors, baseline: Errors) -> tuple[str, ...]:
    in_sample = (str(own.count), f"{own.median:.1%}", f"{own.p90:.1%}", f"{own.bias:+.1%}")
    return (*in_sample, f"{other.median:.1%}", f"{other.p90:.1%}", f"{other.bias:+.1%}", f"{baseline.median:.1%}")
