"""What a bench of serving found, for people and for machines."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from triaxial.measure.bench import Bench
from triaxial.measure.bench_serving import ServingComparison
from triaxial.plan.serving.estimate import ServingEstimate
from triaxial.report.bench_table import rows_document, rows_table

ServingBench = Bench[ServingEstimate, ServingComparison]


def serving_table(bench: ServingBench) -> Table:
    """Predicted / measured and the error of every number, one line a layout."""

    def cells(found: ServingComparison) -> list[str]:
        predicted, measured, errors = found.predicted, found.measured, found.errors
        return [
            f"{predicted.ttft_s * 1e3:.2f} / {measured.ttft_s * 1e3:.2f} ({errors['ttft_s']:+.0%})",
            f"{predicted.tpot_s * 1e3:.2f} / {measured.tpot_s * 1e3:.2f} ({errors['tpot_s']:+.0%})",
            f"{predicted.output_tokens_per_s:.0f} / {measured.output_tokens_per_s:.0f} "
            f"({errors['output_tokens_per_s']:+.0%})",
            f"{predicted.memory_gib['peak']:.2f} / {measured.memory_gib:.2f} ({errors['memory_gib']:+.0%})",
        ]

    return rows_table(bench.rows, ("TTFT ms", "TPOT ms", "output tokens/s", "GiB"), cells)


def serving_document(bench: ServingBench) -> dict[str, Any]:
    """A bench of serving as JSON values."""
    return rows_document(bench, _serving_prediction, "output_tokens_per_s", _serving_comparison)


def _serving_prediction(predicted: ServingEstimate) -> dict[str, Any]:
    return {
        "predicted_ttft_s": predicted.ttft_s,
        "predicted_tpot_s": predicted.tpot_s,
        "predicted_output_tokens_per_s": predicted.output_tokens_per_s,
        "predicted_memory_gib": predicted.memory_gib["peak"],
    }


def _serving_comparison(comparison: ServingComparison) -> dict[str, Any]:
    measured = {f"measured_{name}": value for name, value in vars(comparison.measured).items()}
    return {**measured, "relative_errors": comparison.errors}
