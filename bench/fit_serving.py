"""Fit the constants of the serving model on published measurements, once on all sources and once without each.

    python bench/fit_serving.py inference.csv serving_latency.csv > src/triaxial/plan/validation/serving_left_out.py

Writes
`plan/validation/serving_left_out.py`, and to standard error the constants for `plan/serving/constants.py` and a table of
log errors by source, in sample and left out.
Gauss-Newton on the logarithms: predictions are made exactly, their derivatives by finite differences, and the small
robust least-squares problem in between by scipy. Fits without a source solve the problem as the last iteration has it
linearised, pulled towards `PRIOR`: what only that source could tell stays what one would have guessed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from triaxial.plan.serving.constants import SERVING, ServingConstants
from triaxial.plan.serving.engine import MEGATRON
from triaxial.plan.validation.serving_points import ServedPoint, read_serving
from triaxial.plan.validation.serving_predict import predict_points

Floats = NDArray[np.float64]

# name: (least, guess, most)
CONSTANTS: dict[str, tuple[float, float, float]] = {
    "stream.ampere": (0.6, 0.8, 0.95),
    "stream.gddr": (0.6, 0.8, 0.95),
    "stream.hopper": (0.6, 0.8, 0.95),
    "stream.blackwell": (0.6, 0.8, 0.95),
    "kv_gain": (0.4, 0.9, 1.12),
    "cache_gain": (1.0, 4.0, 20.0),
    "held_rate": (0.6, 0.9, 1.1),
    "graph_kernel_s": (0.5e-6, 2e-6, 6e-6),
    "eager_kernel_s": (2e-6, 5e-6, 12e-6),
    "direct_rate": (0.1, 0.5, 1.0),
    "hosts.fastertransformer.step_s": (1e-5, 0.5e-3, 5e-3),
    "hosts.fastertransformer.sequence_s": (1e-7, 5e-6, 1e-4),
    "hosts.tensorrt-llm-static.step_s": (1e-5, 0.5e-3, 5e-3),
    "hosts.tensorrt-llm-static.sequence_s": (1e-7, 5e-6, 1e-4),
    "hosts.tensorrt-llm.step_s": (1e-5, 1e-3, 5e-3),
    "hosts.tensorrt-llm.sequence_s": (1e-7, 10e-6, 2e-4),
    "hosts.tensorrt-llm.request_s": (1e-3, 20e-3, 0.2),
    "hosts.vllm.step_s": (1e-5, 1e-3, 5e-3),
    "hosts.vllm.sequence_s": (1e-7, 10e-6, 2e-4),
    "hosts.vllm.request_s": (1e-3, 20e-3, 0.2),
}
LOW, PRIOR, HIGH = (np.log([bounds[i] for bounds in CONSTANTS.values()]) for i in range(3))
ITERATIONS = 2
"""From the constants in use."""
PULL = 0.05
"""Weight of staying at the guess: constants that the data leave open do not wander."""
POINTS_PER_SOURCE = 40
"""Evenly spaced rows of a source that are enough to say what it has to say."""
STEP = 0.05


def constants_at(x: Floats) -> ServingConstants:
    return SERVING.with_values(dict(zip(CONSTANTS, np.exp(x).tolist())))


def log_errors(points: list[ServedPoint], x: Floats) -> Floats:
    """log(predicted / measured) of every metric of every point, no further off than a factor of 5."""
    found = [prediction.predicted / prediction.measured for prediction in predict_points(points, constants_at(x))]
    return np.clip(np.log(found), -np.log(5), np.log(5))


def slopes_at(points: list[ServedPoint], x: Floats, errors: Floats) -> Floats:
    """Derivatives of the log errors by the logarithm of each constant; a host's times concern its engine's points."""
    hosts = np.array([point.engine.host for point in points for _ in point.measured])
    slopes = np.zeros((len(errors), len(x)))
    for index, name in enumerate(CONSTANTS):
        nearby = x.copy()
        nearby[index] += STEP
        host = name.split(".")[1] if name.startswith("hosts.") else None
        rows = np.full(len(hosts), True) if host is None else hosts == host
        concerned = [point for point in points if host in (None, point.engine.host)]
        slopes[rows, index] = (log_errors(concerned, nearby) - errors[rows]) / STEP
    return slopes


def solve(errors: Floats, slopes: Floats, weights: Floats, at: Floats, reach: float) -> Floats:
    """Logarithms of the constants that minimise the weighted robust sum of the errors linearised `at`."""

    def residuals(x: Floats) -> Floats:
        return np.concatenate([weights * (errors + slopes @ (x - at)), PULL * (x - PRIOR)])

    low, high = np.maximum(LOW, at - reach), np.minimum(HIGH, at + reach)
    inside = np.clip(at, low + 1e-9, high - 1e-9)
    found: Floats = least_squares(residuals, inside, bounds=(low, high), loss="soft_l1", f_scale=0.05).x
    return found


def shapes_constants(point: ServedPoint) -> bool:
    """Mixtures of experts and Megatron-LM, whose times are its host's more than its devices', only judge."""
    return not point.model.experts and point.engine != MEGATRON


def thinned(points: list[ServedPoint]) -> list[ServedPoint]:
    """At most `POINTS_PER_SOURCE` evenly spaced points of each source."""
    result = []
    for source in sorted({point.source for point in points}):
        own = [point for point in points if point.source == source]
        result += own[:: -(-len(own) // POINTS_PER_SOURCE)]
    return result


def main() -> None:
    points = thinned([p for name in sys.argv[1:] for p in read_serving(Path(name))[0] if shapes_constants(p)])
    sources = np.array([point.source for point in points for _ in point.measured])
    # a source counts as the square root of its rows: many weigh more, but do not drown the others
    weights = np.array([np.count_nonzero(sources == source) ** -0.25 for source in sources])
    x = np.log([SERVING.values()[name] for name in CONSTANTS])
    for iteration in range(ITERATIONS):
        errors = log_errors(points, x)
        print(f"iteration {iteration}: median |log error| {np.median(np.abs(errors)):.4f}", file=sys.stderr, flush=True)
        slopes = slopes_at(points, x, errors)
        x = solve(errors, slopes, weights, x, reach=1.0)
    errors = log_errors(points, x)
    print(f"{len(errors)} metrics: median |log error| {np.median(np.abs(errors)):.4f}", file=sys.stderr)
    print(_rounded(x), file=sys.stderr)
    print(HEADER)
    for source in sorted(set(sources)):
        kept = sources != source
        without = solve(errors[kept], slopes[kept], weights[kept], x, reach=np.inf)
        print(f'    "{source}": {_rounded(without)},', flush=True)
        left_out = log_errors([point for point in points if point.source == source], without)
        print(f"{source:30} {_summary(errors[~kept])} | left out {_summary(left_out)}", file=sys.stderr, flush=True)
    print("}")


def _summary(errors: Floats) -> str:
    size = np.abs(errors)
    return f"median {np.median(size):.3f}, p90 {np.quantile(size, 0.9):.3f}, bias {np.median(errors):+.3f}"


HEADER = '''"""Constants fitted without each source in turn, to judge predictions of that source by. Written by
`bench/fit_serving.py`, not by hand."""

from __future__ import annotations

LEFT_OUT: dict[str, dict[str, float]] = {'''


def _rounded(x: Floats) -> str:
    return "{" + ", ".join(f'"{name}": {value:.3g}' for name, value in zip(CONSTANTS, np.exp(x))) + "}"


if __name__ == "__main__":
    main()
