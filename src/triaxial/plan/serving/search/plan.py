"""`ServingPlan`: model, cluster, demand, the best deployments for an objective, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.serving.demand import Demand, Objective
from triaxial.plan.serving.engine import VLLM, Engine
from triaxial.plan.serving.search.explain import Why, explain
from triaxial.plan.serving.search.frontier import Point, frontier
from triaxial.plan.serving.search.option import Option
from triaxial.plan.serving.search.search import Progress, search
from triaxial.plan.serving.workload import Serving


@dataclass(frozen=True)
class ServingPlan:
    """The answer to `triaxial plan ... serve`."""

    model: ModelSpec
    cluster: Cluster
    work: Serving
    demand: Demand
    objective: Objective
    plans: tuple[Option, ...]
    """Best first."""
    considered: int
    """Ways to cut the model, tp x pp, that the cluster has room for."""
    why: Why
    frontier: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "model": self.model.model_dump(),
            "cluster": self.cluster.model_dump(),
            "workload": {"kind": "serving", **vars(self.work), "requests": len(self.demand.traffic)},
            "objective": self.objective,
            "layouts_considered": self.considered,
            "plans": [plan.to_dict() for plan in self.plans],
            "why": self.why.to_dict(),
            "frontier": [vars(point) for point in self.frontier],
        }


def plan_serving(
    model: ModelSpec,
    cluster: Cluster,
    work: Serving,
    demand: Demand,
    objective: Objective,
    *,
    engine: Engine = VLLM,
    top: int = 5,
    flips: bool = True,
    progress: Progress | None = None,
) -> ServingPlan:
    """Find and explain the best deployments.

    Raises:
        BadInput: the objective needs a price that the cluster lacks.
        NoAnswer: nothing fits or meets the demand; the sentence names what comes nearest.
    """
    if objective == "cost" and cluster.gpu_price_per_hour is None:
        raise BadInput("objective cost needs a price: add --price or gpu_price_per_hour to the cluster file")
    found = search(model, cluster, work, demand, objective, engine=engine, top=top, progress=progress)
    return ServingPlan(
        model=model,
        cluster=cluster,
        work=work,
        demand=demand,
        objective=objective,
        plans=found.best[:top],
        considered=len(found.considered),
        why=explain(found, objective, flips),
        frontier=frontier(found.screened, demand),
    )
