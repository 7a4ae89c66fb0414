"""A run held against its prediction: the step, its terms, and memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.plan.training.price import Estimate, estimate
from triaxial.plan.workload import Training
from triaxial.train.config import TrainConfig

WARM_STEP = 2
"""The first step that counts: those before it allocate and fill caches."""
_GIB = 2.0**30

TERMS = {
    "computation": ("compute", "exposed_tp", "exposed_cp", "exposed_ep"),
    "pipeline": ("bubble", "exposed_pp"),
    "reduction and update": ("exposed_dp", "optimizer"),
    "data loading": ("data",),
}
"""What can be told apart in a run, and the parts of an estimate that it is made of: the actions of the busiest
pipeline rank with the collectives inside them, its waiting and transfers, everything after the schedule, and what
the step waits for its tokens."""


@dataclass(frozen=True)
class Measured:
    """What a run did."""

    step_time_s: float
    """Median of the warm steps."""
    memory_gib: float
    """Of the fullest rank."""
    bubble_fraction: float
    terms: dict[str, float]
    """Seconds by `TERMS`, of the step whose timeline was kept."""


@dataclass(frozen=True)
class Comparison:
    """One layout predicted and measured."""

    predicted: Estimate
    measured: Measured

    @property
    def predicted_s(self) -> float:
        return self.predicted.step_time_s

    @property
    def measured_s(self) -> float:
        return self.measured.step_time_s

    @property
    def error(self) -> float:
        """Of the predicted step time, relative to the measured one."""
        return self.predicted.step_time_s / self.measured.step_time_s - 1

    @property
    def memory_error(self) -> float:
        return self.predicted.memory_gib["peak"] / self.measured.memory_gib - 1

    @property
    def predicted_terms(self) -> dict[str, float]:
        return {term: sum(self.predicted.time_s[part] for part in parts) for term, parts in TERMS.items()}

    @property
    def furthest_term(self) -> str:
        """The term with the most seconds between prediction and measurement."""
        predicted = self.predicted_terms
        return max(TERMS, key=lambda term: abs(predicted[term] - self.measured.terms[term]))


def compare_run(out: Path, cluster: Cluster) -> Comparison:
    """Hold a run's folder against what the planner expects of it on `cluster`.

    Raises:
        BadInput: no run there, or one that the planner cannot price.
    """
    config = read_settings(out)
    work = Training(global_batch=config.global_batch, seq_len=config.seq_len, precision=config.precision)  # type: ignore[arg-type]
    predicted = estimate(load_model_spec(config.model), cluster, work, config.parsed_layout)
    return Comparison(predicted, read_measured(out))


def read_settings(out: Path) -> TrainConfig:
    """What a run was told.

    Raises:
        BadInput: no run there.
    """
    try:
        return TrainConfig.model_validate_json((out / "settings.json").read_bytes())
    except (OSError, ValueError):
        raise BadInput(f"{out} holds no run: there is no settings.json that can be read") from None


def read_measured(out: Path) -> Measured:
    """A run's numbers.

    Raises:
        BadInput: no step was recorded.
    """
    try:
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        timeline = MeasuredStep.from_json((out / "timeline.json").read_bytes()).timeline
    except OSError as error:
        raise BadInput(f"{out} holds no finished run: {error.strerror}: {error.filename}") from None
    steps = [record for line in lines if "loss" in (record := json.loads(line))]
    warm = [record for record in steps if record["step"] >= WARM_STEP] or steps
    if not warm:
        raise BadInput(f"{out} has no step in its metrics.jsonl")
    step_s = median(record["step_time_s"] for record in warm)
    busy_s = max(timeline.busy_s)
    data_s = median(record["data_s"] for record in warm)
    terms = (busy_s, timeline.step_time_s - busy_s, max(0.0, step_s - timeline.step_time_s - data_s), data_s)
    return Measured(
        step_time_s=step_s,
        memory_gib=max(record["peak_memory_bytes"] for record in warm) / _GIB,
        bubble_fraction=median(record["bubble_fraction"] for record in warm),
        terms=dict(zip(TERMS, terms, strict=True)),
    )
