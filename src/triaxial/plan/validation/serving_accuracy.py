"""How far predictions of serving are from published measurements: by source, metric and layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from triaxial.plan.validation.accuracy import Errors, kendall_tau
from triaxial.plan.validation.serving_predict import ServedPrediction


@dataclass(frozen=True)
class LayoutRanking:
    """Predicted against measured order of the layouts of equal work, over all work measured in several layouts."""

    jobs: int
    tau: float
    """Kendall's tau, mean over the jobs with at least three layouts; of all jobs if none has as many."""
    regret_mean: float
    """How much worse than the best measured layout the predicted best one was measured to be."""
    regret_worst: float
    best_picked: float
    """Share of jobs in which the predicted best layout is the measured best."""


def by_source(predictions: Sequence[ServedPrediction]) -> dict[tuple[str, str], list[ServedPrediction]]:
    """Predictions by source and kind of metric: what is measured of a static batch is one kind."""
    found: dict[tuple[str, str], list[ServedPrediction]] = defaultdict(list)
    for prediction in predictions:
        found[prediction.point.source, kind(prediction)].append(prediction)
    return dict(sorted(found.items()))


def by_kind(predictions: Sequence[ServedPrediction]) -> dict[str, list[ServedPrediction]]:
    """Predictions of all sources by kind of metric; mixtures of experts, which no constant was fitted to, apart."""
    found: dict[str, list[ServedPrediction]] = defaultdict(list)
    for prediction in predictions:
        experts = prediction.point.load == "loop" and prediction.point.model.experts
        found[f"{kind(prediction)}{', experts' if experts else ''}"].append(prediction)
    return dict(sorted(found.items()))


def kind(prediction: ServedPrediction) -> str:
    """The metric of a closed loop; otherwise the kind of load, whatever is measured of it."""
    return prediction.metric.removesuffix("_ms").upper() if prediction.point.load == "loop" else prediction.point.load


def errors(predictions: Sequence[ServedPrediction]) -> Errors:
    """Summary of relative errors; every row counts once."""
    values = np.array([prediction.error for prediction in predictions])
    size = np.abs(values)
    return Errors(
        count=len(values),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        mape=float(size.mean()),
        bias=float(np.median(values)),
    )


def rank_layouts(predictions: Sequence[ServedPrediction], *, per_gpu: bool) -> LayoutRanking | None:
    """Compare orders within all work that was measured in several layouts; None if there is none.

    Args:
        per_gpu: rank by seconds times GPUs (cost) instead of seconds (latency).
    """
    jobs: dict[tuple[object, ...], dict[str, tuple[float, float]]] = defaultdict(dict)
    for prediction in predictions:
        if prediction.metric == "ttft_ms" and prediction.point.load == "loop":
            continue  # of a loop, TPOT and throughput decide between layouts
        point = prediction.point
        scale = _seconds_scale(prediction, per_gpu)
        key = (point.job, point.work.concurrency, prediction.metric)
        jobs[key][str(point.layout)] = (scale(prediction.predicted), scale(prediction.measured))
    taus: dict[bool, list[float]] = defaultdict(list)
    regrets = []
    for layouts in jobs.values():
        if len(layouts) < 2:
            continue
        predicted, measured = zip(*layouts.values())
        taus[len(layouts) > 2].append(kendall_tau(predicted, measured))
        regrets.append(measured[predicted.index(min(predicted))] / min(measured) - 1)
    if not regrets:
        return None
    return LayoutRanking(
        jobs=len(regrets),
        tau=mean(taus[True] or taus[False]),
        regret_mean=mean(regrets),
        regret_worst=max(regrets),
        best_picked=mean(regret == 0 for regret in regrets),
    )


def _seconds_scale(prediction: ServedPrediction, per_gpu: bool) -> Callable[[float], float]:
    """From a metric's value to seconds, or seconds times GPUs, up to a factor that all layouts share."""
    gpus = prediction.point.layout.world_size
    if prediction.metric == "tokens_per_s_per_gpu":
        return lambda value: 1 / value / (1 if per_gpu else gpus)
    if prediction.metric == "output_tokens_per_s":
        return lambda value: 1 / value * (gpus if per_gpu else 1)
    return lambda value: value * (gpus if per_gpu else 1)
