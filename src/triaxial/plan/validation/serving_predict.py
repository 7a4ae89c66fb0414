"""Predictions of published serving measurements: static batches in closed form, closed loops simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from triaxial import BadInput
from triaxial.plan.serving.constants import SERVING, ServingConstants
from triaxial.plan.serving.cost.step import StepCost, step_cost
from triaxial.plan.serving.estimate import limits_of, tpot_seconds, traffic_of
from triaxial.plan.serving.search.closed_form import static_batch
from triaxial.plan.serving.simulation.simulate import simulate
from triaxial.plan.serving.traffic import at_once
from triaxial.plan.validation.serving_baseline import roofline_cost
from triaxial.plan.validation.serving_left_out import LEFT_OUT
from triaxial.plan.validation.serving_points import ServedPoint

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ServedPrediction:
    """One metric of a point, measured and predicted: milliseconds, or tokens per second."""

    point: ServedPoint
    metric: str
    predicted: float

    @property
    def measured(self) -> float:
        return self.point.measured[self.metric]

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Comparison:
    """The same points predicted in three ways, row by row in one order."""

    in_sample: list[ServedPrediction]
    left_out: list[ServedPrediction]
    """With constants that were fitted without the point's source; sources that no fit has seen, with the usual ones."""
    baseline: list[ServedPrediction]
    """By the spreadsheet of `serving_baseline.py`."""


def compare(points: Sequence[ServedPoint], progress: Progress | None = None) -> Comparison:
    """Predict every metric of every point, with all constants and with those of its source left out.

    Args:
        progress: called with the points predicted, and those to predict in all, after every source.

    Raises:
        BadInput: a point that cannot run where it is said to have.
    """
    found = Comparison([], [], [])
    for source, group in groupby(sorted(points, key=lambda point: point.source), key=lambda point: point.source):
        own = list(group)
        found.in_sample.extend(predict_points(own))
        found.left_out.extend(predict_points(own, SERVING.with_values(LEFT_OUT.get(source, {}))))
        found.baseline.extend(predict_points(own, baseline=True))
        if progress:
            progress(len({prediction.point.id for prediction in found.in_sample}), len(points))
    return found


def predict_points(
    points: Iterable[ServedPoint], constants: ServingConstants = SERVING, *, baseline: bool = False
) -> list[ServedPrediction]:
    """Predict every metric of every point.

    Raises:
        BadInput: a point that cannot run where it is said to have.
    """
    costs: dict[tuple[object, ...], StepCost] = {}
    found = []
    for point in points:
        of_step = replace(point.work, concurrency=1, input_len=1, output_len=1)
        key = (point.model_name, point.cluster.name, point.layout, of_step, point.engine)
        if key not in costs:
            costs[key] = step_cost(point.model, point.cluster, point.layout, point.work, point.engine, constants)
        found += _predict(point, roofline_cost(point, costs[key]) if baseline else costs[key])
    return found


def _predict(point: ServedPoint, cost: StepCost) -> list[ServedPrediction]:
    metrics = _batch_metrics(point, cost) if point.load == "batch" else _traffic_metrics(point, cost)
    return [ServedPrediction(point, name, metrics[name]) for name in point.measured]


def _batch_metrics(point: ServedPoint, cost: StepCost) -> dict[str, float]:
    work = point.work
    replicas = point.layout.dp
    times = static_batch(cost, max(1, work.concurrency // replicas), work.input_len, work.output_len)
    rate = work.concurrency * work.output_len / times.total_s
    return {
        "e2e_latency_ms": times.total_s * 1e3,
        "ttft_ms": times.ttft_s * 1e3,
        "tpot_ms": times.decode_s / max(1, work.output_len - 1) * 1e3,
        "output_tokens_per_s": rate,
        "tokens_per_s_per_gpu": rate / point.layout.world_size,
    }


def _traffic_metrics(point: ServedPoint, cost: StepCost) -> dict[str, float]:
    work = replace(point.work, max_batch=max(point.work.max_batch, point.work.concurrency))
    if cost.memory.max_sequences(work.input_len + work.output_len) < 1:
        raise BadInput(f"{point.id}: {point.model_name} does not fit {point.layout}")
    traffic = traffic_of(work)
    if point.load == "queue":
        traffic = at_once(traffic.input_tokens, traffic.output_tokens).first(work.concurrency)
    served = simulate(traffic, cost, limits_of(work, cost), replicas=point.layout.dp)
    return {
        "e2e_latency_ms": float(served.latency_s.mean()) * 1e3,
        "ttft_ms": float(served.ttft_s.mean()) * 1e3,
        "tpot_ms": tpot_seconds(served) * 1e3,
        "output_tokens_per_s": served.output_tokens_per_s,
        "tokens_per_s_per_gpu": served.output_tokens_per_s / point.layout.world_size,
    }
