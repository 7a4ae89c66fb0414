"""The end of a run: what was predicted of it beside what it did."""

from __future__ import annotations

import json
from pathlib import Path

from triaxial import BadInput
from triaxial.cluster.spec import load_cluster
from triaxial.files import write_atomically
from triaxial.measure.compare import Comparison, compare_run
from triaxial.report.bench_table import comparison_document
from triaxial.report.si import seconds_text

FAR_OFF = 0.2
"""Relative error of the step time above which the term is named that is furthest off."""


def write_comparison(out: Path, cluster: str) -> str:
    """Write `comparison.json` into a run's folder and say in a few sentences how good the prediction was."""
    try:
        comparison = compare_run(out, load_cluster(cluster))
    except BadInput as error:
        return f"not held against a prediction: {error}"
    write_atomically(out / "comparison.json", json.dumps(comparison_document(comparison), indent=2) + "\n")
    return comparison_text(comparison)


def comparison_text(comparison: Comparison) -> str:
    """`a step took 0.5 s, predicted 0.48 s (-4%)`, its terms, and the one to look at if that is far off."""
    predicted, measured = comparison.predicted.step_time_s, comparison.measured.step_time_s
    expected = comparison.predicted_terms
    terms = [
        f"{term} {seconds_text(took)} ({seconds_text(expected[term])})"
        for term, took in comparison.measured.terms.items()
    ]
    text = (
        f"a step took {seconds_text(measured)}, predicted {seconds_text(predicted)} ({comparison.error:+.0%}); "
        f"in one of them (predicted): {', '.join(terms)}"
    )
    if abs(comparison.error) <= FAR_OFF:
        return text
    term = comparison.furthest_term
    took = comparison.measured.terms[term]
    return f"{text}\nwarning: {term} is furthest off: {seconds_text(took)}, predicted {seconds_text(expected[term])}"
