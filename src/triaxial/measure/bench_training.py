"""Training under every layout: a few steps in fresh processes, held against the price of a step."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.measure.bench import Bench, cuts, divisors, run_layouts
from triaxial.measure.compare import Comparison, compare_run
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.legal import check_training_layout
from triaxial.plan.training.price import Estimate, estimate
from triaxial.plan.workload import Training
from triaxial.train.config import make_config
from triaxial.train.launch import launch


def training_layouts(model: ModelSpec, cluster: Cluster, work: Training) -> list[Layout]:
    """Every legal cut over all of the cluster's ranks, each with the micro-batch predicted to be best."""
    found = []
    for cut in cuts(cluster.num_gpus):
        candidates = [replace(cut, mb=mb) for mb in divisors(max(1, work.global_batch // cut.dp))]
        legal = [layout for layout in candidates if _is_legal(layout, model, cluster, work)]
        if legal:
            found.append(min(legal, key=lambda layout: estimate(model, cluster, work, layout).step_time_s))
    return found


def bench_training(
    model: str,
    cluster: Cluster,
    work: Training,
    layouts: Sequence[Layout],
    *,
    steps: int,
    out: Path,
    data: Path | None = None,
    tell: Callable[[Layout], None],
) -> Bench[Estimate, Comparison]:
    """Train a few steps under every layout.

    Args:
        out: a folder for the runs; each gets one of its own.
        data: text to train on; Python's own library if not given.
        tell: called with the layout that starts.

    Raises:
        BadInput: a layout that cannot be priced.
    """
    spec = load_model_spec(model)

    def run(layout: Layout, _: Estimate) -> Comparison:
        config = make_config(
            {
                "model": model,
                "data": data or Path(sysconfig.get_path("stdlib")),
                "layout": str(layout),
                "out": out / str(layout).replace(",", "-"),
                "steps": steps,
                "global_batch": work.global_batch,
                "seq_len": work.seq_len,
                "precision": work.precision,
            }
        )
        launch(config)
        return compare_run(config.out, cluster)

    return run_layouts(layouts, lambda layout: estimate(spec, cluster, work, layout), run, tell)


def _is_legal(layout: Layout, model: ModelSpec, cluster: Cluster, work: Training) -> bool:
    try:
        check_training_layout(layout, model, cluster, work)
    except BadInput:
        return False
    return True
