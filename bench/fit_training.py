"""Fit the constants of the training model on published steps, once on all sources and once without each of them.

    python bench/fit_training.py training.csv training_vtrain_single.csv > src/triaxial/plan/validation/left_out.py

Mixtures of experts and context parallelism are left out: their rows judge the constants of what Triaxial runs, they do
not shape them.
Prints `plan/validation/left_out.py`, and to standard error the constants for `plan/training/constants.py`; about three
minutes on one core. Gauss-Newton on the logarithms: predictions are made exactly, their derivatives by finite differences, and the small robust least-squares
problem in between by scipy. Every fit starts from `PRIOR`, so that nothing of a source that is left out leaks in.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from triaxial.plan.cost.placement import place
from triaxial.plan.layout_table import LayoutTable, layout_table
from triaxial.plan.training.block_seconds import PricedBlocks, price_blocks
from triaxial.plan.training.constants import TrainingConstants
from triaxial.plan.training.price import fits, memory_of, step_seconds
from triaxial.plan.validation.accuracy import laboratory
from triaxial.plan.validation.published import Point, read_points

Case = tuple[Point, LayoutTable, PricedBlocks]

BOUNDS = {
    "host_s_per_operation": (5e-6, 150e-6),
    "interference": (0.01, 1.0),
    "held_rate": (0.6, 1.0),
    "step_s": (0.001, 0.1),
}
PRIOR = TrainingConstants(
    host_s_per_operation=20e-6,
    interference=0.1,
    held_rate=0.9,
    step_s=0.01,
)
"""Where fits start: what one would guess from the literature."""
ITERATIONS = 3
PULL = 0.05
"""Weight of staying where the last iteration was: constants that the data leave open do not wander."""
CASES_PER_SOURCE = 60
"""Evenly spaced configurations of a source that are enough to say what it has to say."""


def prepare(points: list[Point]) -> list[Case]:
    """One case per configuration: the layouts that fit, with their blocks priced."""
    seen: set[str] = set()
    cases = []
    for point in points:
        if point.config_group in seen:
            continue
        seen.add(point.config_group)
        table = layout_table(point.layouts)
        peak = memory_of(point.model, point.training, point.practice, table).peak
        fitting = np.flatnonzero(fits(point.cluster, peak))
        table = table.take(fitting) if len(fitting) else table
        priced = price_blocks(point.model, point.training, point.practice, table, place(point.cluster, table))
        cases.append((point, table, priced))
    return cases


def log_errors(cases: list[Case], constants: TrainingConstants) -> np.ndarray:
    """log(predicted / measured) of every case."""
    predicted = [
        step_seconds(p.model, p.cluster, p.training, table, p.practice, constants, priced).step.min()
        for p, table, priced in cases
    ]
    return np.log(np.array(predicted) / np.array([point.step_time_s for point, _, _ in cases]))


def jacobian(cases: list[Case], constants: TrainingConstants, errors: np.ndarray) -> np.ndarray:
    """Derivatives of the log errors by the logarithm of each constant."""
    step = 0.05
    columns = []
    for name in BOUNDS:
        nearby = replace(constants, **{name: getattr(constants, name) * np.exp(step)})
        columns.append((log_errors(cases, nearby) - errors) / step)
    return np.stack(columns, axis=1)


def solve(errors: np.ndarray, slopes: np.ndarray, weights: np.ndarray, start: TrainingConstants) -> TrainingConstants:
    """The constants that minimise the weighted robust sum of linearised errors."""
    at = np.log([getattr(start, name) for name in BOUNDS])
    low, high = np.log(np.array(list(BOUNDS.values()))).T
    reach = 0.7

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([weights * (errors + slopes @ (x - at)), PULL * (x - at)])

    lower, upper = np.maximum(low, at - reach), np.minimum(high, at + reach)
    inside = np.clip(at, lower + 1e-9, upper - 1e-9)
    found = least_squares(residuals, inside, bounds=(lower, upper), loss="soft_l1", f_scale=0.05)
    return replace(start, **dict(zip(BOUNDS, np.exp(found.x).tolist())))


def source_weights(cases: list[Case]) -> np.ndarray:
    """A source counts as the square root of its cases: many rows weigh more, but do not drown the others."""
    sources = [point.source for point, _, _ in cases]
    return np.array([sources.count(source) ** -0.25 for source in sources])


def fit(cases: list[Case], errors: np.ndarray, slopes: np.ndarray) -> TrainingConstants:
    """The constants that explain these cases best. Errors and their derivatives are those with `PRIOR`."""
    weights, constants = source_weights(cases), PRIOR
    for _ in range(ITERATIONS - 1):
        constants = solve(errors, slopes, weights, constants)
        errors = log_errors(cases, constants)
        slopes = jacobian(cases, constants, errors)
    return solve(errors, slopes, weights, constants)


def runs(point: Point) -> bool:
    """Whether Triaxial could run it, but for the shape of its layers."""
    return point.model.experts is None and point.layouts[0].cp == 1


def thinned(points: list[Point]) -> list[Point]:
    """At most `CASES_PER_SOURCE` evenly spaced points of each source."""
    result = []
    for source in sorted({point.source for point in points}):
        own = [point for point in points if point.source == source]
        result += own[:: -(-len(own) // CASES_PER_SOURCE)]
    return result


def main() -> None:
    points = [point for name in sys.argv[1:] for point in read_points(Path(name))[0] if runs(point)]
    cases = prepare(thinned(points))
    errors = log_errors(cases, PRIOR)
    slopes = jacobian(cases, PRIOR, errors)
    best = fit(cases, errors, slopes)
    found = np.abs(log_errors(cases, best))
    print(f"{len(cases)} cases, mean |log error| {found.mean():.4f}, median {np.median(found):.4f}", file=sys.stderr)
    print(f"TRAINING = {_rounded(best)}", file=sys.stderr, flush=True)
    print(HEADER)
    for name in sorted({laboratory(point) for point, _, _ in cases}):
        kept = [index for index, (point, _, _) in enumerate(cases) if laboratory(point) != name]
        without = fit([cases[index] for index in kept], errors[kept], slopes[kept])
        print(f'    "{name}": {_rounded(without)},', flush=True)
    print("}")


HEADER = '''"""Constants fitted without each source in turn, to judge predictions of that source by. Written by
`bench/fit_training.py`, not by hand."""

from __future__ import annotations

from triaxial.plan.training.constants import TrainingConstants

LEFT_OUT: dict[str, TrainingConstants] = {'''


def _rounded(constants: TrainingConstants) -> str:
    arguments = ", ".join(f"{name}={getattr(constants, name):.3g}" for name in BOUNDS)
    return f"TrainingConstants({arguments})"


if __name__ == "__main__":
    main()
