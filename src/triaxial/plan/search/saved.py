"""A plan read back from the file that `triaxial plan ... train --out` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout, parse_layout
from triaxial.plan.search.explain import RUNNABLE
from triaxial.plan.workload import Training


@dataclass(frozen=True)
class SavedPlan:
    """What a training plan says."""

    model: ModelSpec
    cluster: Cluster
    training: Training
    layouts: tuple[Layout, ...]
    """Best first; last the best that Triaxial itself can run, if the plan names it."""


def read_saved_plan(path: Path) -> SavedPlan:
    """Read a training plan.

    Raises:
        BadInput: no such file, or no training plan.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        layouts = [parse_layout(str(plan["layout"])) for plan in document["plans"]]
        rival = document["why"]["rivals"].get(RUNNABLE)
        if isinstance(rival, dict):
            layouts.append(parse_layout(str(rival["layout"])))
        return SavedPlan(
            model=ModelSpec.model_validate(document["model"]),
            cluster=Cluster.model_validate(document["cluster"]),
            training=Training(**{field.name: document["workload"][field.name] for field in fields(Training)}),
            layouts=tuple(layouts),
        )
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is no training plan: write one with triaxial plan ... train ... --out FILE") from None
