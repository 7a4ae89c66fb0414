"""`TrainingPlan`: model, cluster, workload, the best layouts for an objective, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.search.best import Found, Space, search, search_space
from triaxial.plan.search.explain import Why, explain
from triaxial.plan.search.what_if import smaller_clusters, with_gpus
from triaxial.plan.training.price import Estimate
from triaxial.plan.workload import Training

OBJECTIVES = ("time", "throughput", "cost", "gpus", "memory")
"""Shortest step; most tokens/s per GPU, or least money per token, on as many GPUs as is best; fewest GPUs that fit;
least memory among the layouts nearly as fast as the fastest."""
FLIPS_UP_TO_GPUS = 64
"""Flip points take some tens of searches: a second or two up to here, and done by default."""


@dataclass(frozen=True)
class TrainingPlan:
    """The answer to `triaxial plan ... train`."""

    model: ModelSpec
    cluster: Cluster
    training: Training
    objective: str
    plans: tuple[Estimate, ...]
    """Best first."""
    considered: int
    """Legal layouts, all of them covered by the search."""
    why: Why
    whole_run: dict[str, float] | None
    """Days, GPU-hours and (with a price) cost of training on the tokens asked about."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "model": self.model.model_dump(),
            "cluster": self.cluster.model_dump(),
            "workload": {"kind": "training", **vars(self.training)},
            "objective": self.objective,
            "layouts_considered": self.considered,
            "plans": [plan.to_dict() for plan in self.plans],
            "why": self.why.to_dict(),
            "whole_run": self.whole_run,
        }


def plan_training(
    model: ModelSpec,
    cluster: Cluster,
    training: Training,
    *,
    top: int = 5,
    objective: str = "time",
    within: float = 0.05,
    tokens: float | None = None,
    flips: bool | None = None,
) -> TrainingPlan:
    """Find and explain the best layouts.

    Args:
        within: with the objective `memory`, how much slower than the fastest a layout may be (0.05 is 5 %).
        tokens: tokens of the whole training, for days and GPU-hours.
        flips: look for flip points; None does so for clusters of up to `FLIPS_UP_TO_GPUS`.

    Raises:
        BadInput: the objective needs a price that the cluster lacks.
        NoAnswer: nothing fits; the sentence names the smallest cluster that would do.
    """
    if objective == "cost" and cluster.gpu_price_per_hour is None:
        raise BadInput("objective cost needs a price: add --gpu-price or gpu_price_per_hour to the cluster file")
    cluster, found, space = _best(model, cluster, training, top, objective, within)
    winner = found.best[0]
    with_flips = cluster.num_gpus <= FLIPS_UP_TO_GPUS if flips is None else flips
    return TrainingPlan(
        model=model,
        cluster=cluster,
        training=training,
        objective=objective,
        plans=found.best[:top],
        considered=found.considered,
        why=explain(model, cluster, training, winner, space, with_flips),
        whole_run=_whole_run(winner, cluster, tokens) if tokens else None,
    )


Choice = tuple[Cluster, Found, Space]


def _best(model: ModelSpec, cluster: Cluster, training: Training, top: int, objective: str, within: float) -> Choice:
    if objective in ("throughput", "cost", "gpus"):
        choices = [_choose(model, part, training, top) for part in smaller_clusters(cluster)]
        fitting = [choice for choice in choices if choice]
        if fitting and objective == "gpus":
            return fitting[0]
        if fitting:  # with one price per GPU-hour, the least cost per token is the most tokens per GPU and second
            return max(fitting, key=lambda choice: choice[1].best[0].tokens_per_s_per_gpu)
    try:
        space = search_space(model, cluster, training)
        found = search(model, cluster, training, top=top, within=within if objective == "memory" else 0, space=space)
    except NoAnswer as error:
        raise NoAnswer(f"{error}; {_smallest_that_fits(model, cluster, training)}") from None
    if objective == "memory":
        leanest = tuple(sorted(found.best, key=lambda e: (e.memory_gib["peak"], e.step_time_s)))
        found = replace(found, best=leanest)
    return cluster, found, space


def _choose(model: ModelSpec, cluster: Cluster, training: Training, top: int) -> Choice | None:
    try:
        space = search_space(model, cluster, training)
        return cluster, search(model, cluster, training, top=top, space=space), space
    except NoAnswer:
        return None


def _smallest_that_fits(model: ModelSpec, cluster: Cluster, training: Training) -> str:
    gpus = cluster.num_gpus
    for _ in range(10):
        gpus *= 2
        try:
            larger = with_gpus(cluster, gpus)
        except BadInput:
            break
        if _choose(model, larger, training, 1):
            return f"the smallest cluster that would do is {larger.name}"
    return f"no cluster of up to {gpus} such GPUs does with global batch {training.global_batch}"


def _whole_run(winner: Estimate, cluster: Cluster, tokens: float) -> dict[str, float]:
    hours = tokens / winner.tokens_per_s / 3600
    run = {"tokens": tokens, "days": hours / 24, "gpu_hours": hours * cluster.num_gpus}
    if cluster.gpu_price_per_hour is not None:
        run["cost"] = run["gpu_hours"] * cluster.gpu_price_per_hour
    return run
