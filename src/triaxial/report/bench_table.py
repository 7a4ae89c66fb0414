"""What a bench found, for people and for machines."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from triaxial.measure.bench import Bench, Row
from triaxial.measure.compare import Comparison


def bench_table(bench: Bench) -> Table:
    """Predicted beside measured, one line a layout."""
    table = Table()
    table.add_column("layout", overflow="fold")
    for heading in (
        "predicted s",
        "measured s",
        "error",
        "GiB predicted",
        "GiB measured",
        "bubble pred.",
        "bubble meas.",
    ):
        table.add_column(heading, justify="right")
    for row in bench.rows:
        if row.comparison is None:
            table.add_row(str(row.layout), f"{row.predicted.step_time_s:.3f}", row.failure)
            continue
        predicted, measured = row.predicted, row.comparison.measured
        table.add_row(
            str(row.layout),
            f"{predicted.step_time_s:.3f}",
            f"{measured.step_time_s:.3f}",
            f"{row.comparison.error:+.1%}",
            f"{predicted.memory_gib['peak']:.2f}",
            f"{measured.memory_gib:.2f}",
            f"{predicted.bubble_fraction:.1%}",
            f"{measured.bubble_fraction:.1%}",
        )
    return table


def bench_document(bench: Bench) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "layouts": [_row(row) for row in bench.rows],
        "regret": bench.regret,
        "rank_correlation": bench.rank_correlation,
    }


def _row(row: Row) -> dict[str, Any]:
    known = {"layout": str(row.layout), "predicted_step_time_s": row.predicted.step_time_s}
    if row.comparison is None:
        return {**known, "measured_step_time_s": None, "error": row.failure}
    return {**known, **comparison_document(row.comparison)}


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
