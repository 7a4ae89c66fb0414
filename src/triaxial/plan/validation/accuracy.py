"""How far predictions are from published measurements, row by row, by source and in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from statistics import median

import numpy as np

from triaxial.plan.layout_table import layout_table
from triaxial.plan.training.constants import TRAINING, TrainingConstants
from triaxial.plan.training.price import estimates
from triaxial.plan.validation.left_out import LEFT_OUT
from triaxial.plan.validation.published import Point


@dataclass(frozen=True)
class Prediction:
    """A measured step beside the predicted one."""

    point: Point
    step_time_s: float
    memory_gib: float
    layout: str

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.step_time_s / self.point.step_time_s - 1

    @property
    def memory_error(self) -> float | None:
        measured = self.point.memory_gib
        return self.memory_gib / measured - 1 if measured else None


@dataclass(frozen=True)
class Errors:
    """Relative errors of a set of predictions; each configuration counts once however often it was measured."""

    count: int
    median: float
    p90: float
    mape: float
    """Mean of the absolute errors."""
    bias: float
    """Median of the signed errors."""


@dataclass(frozen=True)
class Ranking:
    """Predicted against measured order of the layouts of one job, over all jobs measured in several layouts."""

    jobs: int
    tau: float
    """Kendall's tau, median over jobs with at least three layouts; of all jobs if none has as many."""
    regret_median: float
    """How much slower than the best measured layout the predicted best one was measured to be."""
    regret_mean: float
    regret_worst: float
    best_picked: float
    """Share of jobs in which the predicted best layout is the measured best."""
    random_regret: float
    """Mean regret of picking any layout at random."""


def predict(points: Iterable[Point]) -> list[Prediction]:
    """Predict every point. Where a source leaves cells empty, the fastest plausible layout that fits is meant."""
    return [_predict(point, TRAINING) for point in points]


def predict_left_out(points: Iterable[Point]) -> list[Prediction]:
    """Predict every point with constants that were fitted without its laboratory's measurements: cross-validation.

    Laboratories that no fit has seen are predicted with the usual constants.
    """
    return [_predict(point, LEFT_OUT.get(laboratory(point), TRAINING)) for point in points]


def _predict(point: Point, constants: TrainingConstants) -> Prediction:
    table = layout_table(point.layouts)
    priced = estimates(point.model, point.cluster, point.training, table, point.practice, constants)
    best = min(priced, key=lambda e: (not e.fits, e.step_time_s))
    return Prediction(point, best.step_time_s, best.memory_gib["peak"], str(best.layout))


def errors(predictions: Sequence[Prediction], error: Callable[[Prediction], float] = lambda p: p.error) -> Errors:
    """Summarise, each configuration once."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for prediction in predictions:
        by_group[prediction.point.config_group].append(error(prediction))
    values = np.array([float(np.mean(group)) for group in by_group.values()])
    size = np.abs(values)
    return Errors(
        count=len(values),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        mape=float(size.mean()),
        bias=float(np.median(values)),
    )


def constant_mfu(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The baseline of a spreadsheet: every step at the median MFU that the *other* sources measured."""
    measured = [_measured_mfu(p.point) for p in predictions]
    result = []
    for prediction in predictions:
        point = prediction.point
        others = [mfu for mfu, p in zip(measured, predictions) if p.point.source != point.source]
        step = _measured_mfu(point) / median(others or measured) * point.step_time_s
        result.append(replace(prediction, step_time_s=step))
    return result


def _measured_mfu(point: Point) -> float:
    flop = point.model.train_flop_per_token(point.training.seq_len) * point.training.tokens
    peak = point.cluster.device.peak(point.training.precision) * point.cluster.num_gpus
    return flop / peak / point.step_time_s


ONE_LABORATORY = {"vtm": "vtrain", "vts": "vtrain", "sc21t1": "sc21", "sc21t2": "sc21"}
"""Sources that must be left out together: their rows were measured by the same people on the same machine."""


def laboratory(point: Point) -> str:
    return ONE_LABORATORY.get(point.source, point.source)


def by_source(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by the source of their row."""
    ordered = sorted(predictions, key=lambda p: p.point.source)
    return {source: list(group) for source, group in groupby(ordered, key=lambda p: p.point.source)}


def ranking(predictions: Sequence[Prediction]) -> Ranking | None:
    """Compare orders within every job that was measured in at least two layouts; None if there is none."""
    jobs: dict[tuple[object, ...], dict[str, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for prediction in predictions:
        jobs[prediction.point.job][prediction.layout].append(prediction)
    taus: dict[int, list[float]] = defaultdict(list)
    regrets, picked, random = [], [], []
    for layouts in jobs.values():
        if len(layouts) < 2:
            continue
        predicted = [median(p.step_time_s for p in group) for group in layouts.values()]
        measured = [median(p.point.step_time_s for p in group) for group in layouts.values()]
        taus[min(len(layouts), 3)].append(kendall_tau(predicted, measured))
        best = min(measured)
        regret = measured[predicted.index(min(predicted))] / best - 1
        regrets.append(regret)
        picked.append(regret == 0)
        random.append(float(np.mean(measured)) / best - 1)
    if not regrets:
        return None
    return Ranking(
        jobs=len(regrets),
        tau=median(taus.get(3) or [tau for group in taus.values() for tau in group]),
        regret_median=median(regrets),
        regret_mean=float(np.mean(regrets)),
        regret_worst=max(regrets),
        best_picked=float(np.mean(picked)),
        random_regret=float(np.mean(random)),
    )


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-a: concordant minus discordant pairs over all pairs."""
    signs = [np.sign(a - b) * np.sign(c - d) for (a, c), (b, d) in combinations(zip(first, second), 2)]
    return float(np.mean(signs))
