"""What a message costs on its way between stages, and what waiting for it costs where ranks share processors."""

from __future__ import annotations

from math import factorial

import numpy as np
import pytest

from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.cost.collectives import collective_seconds, group_of
from triaxial.plan.cost.placement import place
from triaxial.plan.layout import parse_layout
from triaxial.plan.layout_table import SCHEDULES, layout_table
from triaxial.plan.training.price import hop_seconds
from triaxial.plan.training.shared_processors import shared_pipeline_seconds
from triaxial.plan.workload import Training

CLUSTER = load_cluster("2x8xH100-SXM")
MODEL = load_model_spec("llama-3.1-8b")
WORK = Training(global_batch=16, seq_len=4096, precision="bf16")
OUTPUT = 4096 * MODEL.hidden * 2
"""Bytes of a stage's output for one sequence."""


@pytest.mark.parametrize(
    ("text", "parts", "gathered"),
    [
        ("tp=8,pp=2,mb=1", 8, True),
        ("tp=8,pp=2,mb=1,sp=1", 8, False),
        ("tp=2,pp=4,dp=2,mb=1,order=tp-cp-pp-dp", 1, False),
        ("tp=2,pp=8,mb=1,order=pp-cp-dp-tp", 1, False),
    ],
    ids=["between nodes", "in parts already", "inside a node", "tensor parallelism across"],
)
def test_a_message_between_nodes_goes_in_parts_and_is_gathered(text: str, parts: int, gathered: bool) -> None:
    layout = parse_layout(text)
    table = layout_table([layout])
    sizes = {axis: getattr(layout, axis) for axis in layout.order.split("-")}
    pp, tp = (group_of(CLUSTER, sizes, axis) for axis in ("pp", "tp"))
    expected = float(collective_seconds(CLUSTER, "send_recv", OUTPUT / parts, pp))
    if gathered:
        expected += float(collective_seconds(CLUSTER, "all_gather", OUTPUT, tp))
    assert float(hop_seconds(MODEL, WORK, table, place(CLUSTER, table))[0]) == pytest.approx(expected)


def pipeline(ranks_per_processor: float, pp: int, count: int, travel: float, kind: str = "1f1b") -> float:
    """Seconds for stages of one second each."""
    sizes = (np.array([SCHEDULES.index(kind)]), np.array([pp]), np.array([count]))
    seconds = (np.array([value]) for value in (1.0, float(pp), travel))
    return float(shared_pipeline_seconds(ranks_per_processor, *sizes, *seconds)[0])


def test_one_micro_batch_has_the_processors_for_itself() -> None:
    assert pipeline(2, 4, 1, 0.3) == pytest.approx(4 / 2 + 0.3)
    assert pipeline(2, 2, 1, 0.0) == pytest.approx(1)
    assert pipeline(8, 4, 1, 0.0) == pytest.approx(1), "a stage's own ranks share processors too"


def test_without_travel_shared_processors_are_always_busy() -> None:
    assert pipeline(2, 2, 8, 0.0) == pytest.approx(8)
    assert pipeline(2, 4, 2, 0.0) == pytest.approx(2.5), "(m + p - 1) slots at twice the speed"


@pytest.mark.parametrize(
    ("pp", "count", "kind", "in_flight"), [(4, 32, "1f1b", 4), (3, 2, "1f1b", 2), (2, 6, "gpipe", 6)]
)
def test_throughput_is_that_of_machines_that_wait_for_one_repairman(
    pp: int, count: int, kind: str, in_flight: int
) -> None:
    """M/M/1//N: the repairman is idle with probability 1 / sum N!/(N-n)! (service/travel)^n."""
    travel = 1.7
    idle = 1 / sum(factorial(in_flight) / factorial(in_flight - n) / travel**n for n in range(in_flight + 1))
    assert pipeline(pp, pp, count, travel, kind) == pytest.approx(count / (1 - idle))
