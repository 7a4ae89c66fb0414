"""Settings of a training run that a plan decides: its layout and, from a plan's file, its workload."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.parallel.program import check_runnable
from triaxial.plan.layout import Layout
from triaxial.plan.search.best import search, search_space
from triaxial.plan.search.saved import read_saved_plan
from triaxial.plan.workload import Training
from triaxial.train.config import TrainConfig

WORKLOAD = ("global_batch", "seq_len", "precision")
DEFAULTS = {name: TrainConfig.model_fields[name].default for name in WORKLOAD}


def read_plan(path: Path, model: str | None) -> dict[str, Any]:
    """Model, layout and workload of a file that `triaxial plan --out` wrote: the best layout that can run.

    Args:
        model: the model to train, which must be the one planned for; None takes that by its name.

    Raises:
        BadInput: no such file, no training plan, of another model, or none of its layouts can run.
    """
    plan = read_saved_plan(path)
    name = model or plan.model.name
    if load_model_spec(name) != plan.model:
        raise BadInput(f"{path} is a plan for {plan.model.name}, not for {name}: plan again")
    workload = {name: getattr(plan.training, name) for name in WORKLOAD}
    return {"model": name, "layout": str(first_runnable(plan.layouts, plan.model)), **workload}


def plan_layout(cluster: str, settings: dict[str, Any]) -> str:
    """The layout that is fastest on a cluster among those that can run, for the model and workload of these settings.

    Raises:
        BadInput: an unknown cluster, or a workload that cannot be planned.
        NoAnswer: nothing fits.
    """
    work = DEFAULTS | {name: settings[name] for name in WORKLOAD if name in settings}
    model, where, training = load_model_spec(str(settings["model"])), load_cluster(cluster), Training(**work)
    space = search_space(model, where, training)
    runnable = space.where((space.families.cp == 1) & (space.families.ep == 1))
    if len(runnable.families) == 0:
        raise NoAnswer(f"no layout of {model.name} on {where.name} does without context and expert parallelism")
    found = search(model, where, training, top=1, space=runnable).best
    return str(first_runnable((estimate.layout for estimate in found), model))


def first_runnable(layouts: Iterable[Layout], model: ModelSpec) -> Layout:
    """The first layout that the runtime can run.

    Raises:
        BadInput: none, with why the first one cannot.
    """
    reason = ""
    for layout in layouts:
        try:
            check_runnable(layout, model)
            return layout
        except BadInput as error:
            reason = reason or str(error)
    raise BadInput(reason or "the plan holds no layout")
