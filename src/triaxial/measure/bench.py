"""The bench: layouts run for real, each in fresh processes, beside what the planner expects of them."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import Cluster
from triaxial.measure.compare import Comparison, compare_run
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.legal import check_training_layout
from triaxial.plan.training.price import Estimate, estimate
from triaxial.plan.validation.accuracy import kendall_tau
from triaxial.plan.workload import Training
from triaxial.train.config import make_config
from triaxial.train.launch import launch


@dataclass(frozen=True)
class Row:
    """One layout: predicted and measured, or why it did not run."""

    layout: Layout
    predicted: Estimate
    comparison: Comparison | None = None
    failure: str = ""


@dataclass(frozen=True)
class Bench:
    """All layouts of one model and one amount of work."""

    rows: tuple[Row, ...]

    @property
    def measured(self) -> list[Comparison]:
        return [row.comparison for row in self.rows if row.comparison]

    @property
    def regret(self) -> float | None:
        """How much slower the layout predicted to be fastest is than the fastest measured one."""
        if not self.measured:
            return None
        chosen = min(self.measured, key=lambda row: row.predicted.step_time_s)
        return chosen.measured.step_time_s / min(row.measured.step_time_s for row in self.measured) - 1

    @property
    def rank_correlation(self) -> float | None:
        """Kendall's tau of predicted and measured step times; None for fewer than two layouts."""
        if len(self.measured) < 2:
            return None
        predicted = [row.predicted.step_time_s for row in self.measured]
        return kendall_tau(predicted, [row.measured.step_time_s for row in self.measured])


def all_layouts(model: ModelSpec, cluster: Cluster, work: Training) -> list[Layout]:
    """Every legal tp x pp x dp over all of the cluster's ranks, each with the micro-batch predicted to be best."""
    world, found = cluster.num_gpus, []
    sizes = [(tp, pp) for tp in _divisors(world) for pp in _divisors(world // tp)]
    for tp, pp in sizes:
        dp = world // tp // pp
        candidates = [Layout(tp=tp, pp=pp, dp=dp, mb=mb) for mb in _divisors(max(1, work.global_batch // dp))]
        legal = [layout for layout in candidates if _is_legal(layout, model, cluster, work)]
        if legal:
            found.append(min(legal, key=lambda layout: estimate(model, cluster, work, layout).step_time_s))
    return found


def run_bench(
    model: str,
    cluster: Cluster,
    work: Training,
    layouts: Sequence[Layout],
    *,
    steps: int,
    out: Path,
    data: Path | None = None,
    tell: Callable[[Layout], None],
) -> Bench:
    """Train a few steps under every layout; one that fails is a row that says why.

    Args:
        out: a folder for the runs; each gets one of its own.
        data: text to train on; Python's own library if not given.
        tell: called with the layout that starts.

    Raises:
        BadInput: a layout that cannot be priced.
    """
    spec = load_model_spec(model)
    rows = []
    for layout in layouts:
        predicted = estimate(spec, cluster, work, layout)
        tell(layout)
        settings = {
            "model": model,
            "data": data or Path(sysconfig.get_path("stdlib")),
            "layout": str(layout),
            "out": out / str(layout).replace(",", "-"),
            "steps": steps,
            "global_batch": work.global_batch,
            "seq_len": work.seq_len,
            "precision": work.precision,
        }
        row = Row(layout, predicted)
        try:
            config = make_config(settings)
            launch(config)
            rows.append(replace(row, comparison=compare_run(config.out, cluster)))
        except (BadInput, NoAnswer) as error:
            rows.append(replace(row, failure=str(error)))
    return Bench(tuple(rows))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _is_legal(layout: Layout, model: ModelSpec, cluster: Cluster, work: Training) -> bool:
    try:
        check_training_layout(layout, model, cluster, work)
    except BadInput:
        return False
    return True
