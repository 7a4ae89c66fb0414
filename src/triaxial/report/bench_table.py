"""What a bench found, for people and for machines; of training here, of serving in `bench_serving_table.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from triaxial.measure.bench import Bench, Row
from triaxial.measure.compare import Comparison
from triaxial.plan.training.price import Estimate

TrainingBench = Bench[Estimate, Comparison]


def training_table(bench: TrainingBench) -> Table:
    """Predicted beside measured, one line a layout."""
    headings = ("predicted s", "measured s", "error", "GiB predicted", "GiB measured", "bubble pred.", "bubble meas.")

    def cells(found: Comparison) -> list[str]:
        predicted, measured = found.predicted, found.measured
        return [
            f"{predicted.step_time_s:.3f}",
            f"{measured.step_time_s:.3f}",
            f"{found.error:+.1%}",
            f"{predicted.memory_gib['peak']:.2f}",
            f"{measured.memory_gib:.2f}",
            f"{predicted.bubble_fraction:.1%}",
            f"{measured.bubble_fraction:.1%}",
        ]

    return rows_table(bench.rows, headings, cells)


def rows_table(rows: Sequence[Row[Any, Any]], headings: Sequence[str], cells: Callable[[Any], list[str]]) -> Table:
    """A line a layout; `verdict` says why some have not run."""
    table = Table()
    table.add_column("layout", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(str(row.layout), *(cells(row.comparison) if row.comparison else ["failed"]))
    return table


def verdict(bench: Bench[Any, Any]) -> str:
    """Why layouts have failed, and how good the planner's choice and its order of the others are, a line each."""
    lines = [f"{row.layout}: {row.failure}" for row in bench.rows if row.failure]
    if bench.regret is not None:
        lines.append(f"regret of the planner's choice: {bench.regret:.1%}")
    if bench.rank_correlation is not None:
        lines.append(f"Kendall's tau of predicted and measured: {bench.rank_correlation:.2f}")
    return "\n".join(lines)


def training_document(bench: TrainingBench) -> dict[str, Any]:
    """A bench of training as JSON values."""
    return rows_document(
        bench, lambda predicted: {"predicted_step_time_s": predicted.step_time_s}, "step_time_s", comparison_document
    )


def rows_document(
    bench: Bench[Any, Any],
    predicted: Callable[[Any], dict[str, Any]],
    compared_by: str,
    found: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """A bench as JSON values.

    Args:
        predicted: what to say of a layout's prediction.
        compared_by: the number that is None where a layout did not run.
        found: what to say of one that did.
    """

    def row(row: Row[Any, Any]) -> dict[str, Any]:
        known = {"layout": str(row.layout), **predicted(row.predicted)}
        if row.comparison is None:
            return {**known, f"measured_{compared_by}": None, "error": row.failure}
        return {**known, **found(row.comparison)}

    return {
        "layouts": [row(one) for one in bench.rows],
        "regret": bench.regret,
        "rank_correlation": bench.rank_correlation,
    }


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """One layout's prediction and measurement as JSON values."""
    predicted, measured = comparison.predicted, comparison.measured
    return {
        "predicted_step_time_s": predicted.step_time_s,
        "measured_step_time_s": measured.step_time_s,
        "relative_error": comparison.error,
        "predicted_memory_gib": predicted.memory_gib["peak"],
        "measured_memory_gib": measured.memory_gib,
        "memory_relative_error": comparison.memory_error,
        "predicted_bubble_fraction": predicted.bubble_fraction,
        "measured_bubble_fraction": measured.bubble_fraction,
        "predicted_terms_s": comparison.predicted_terms,
        "measured_terms_s": measured.terms,
    }
