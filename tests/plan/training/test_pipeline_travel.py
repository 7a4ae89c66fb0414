"""What a message costs on its way between stages, and what waiting for it costs where ranks share processors."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import factorial

import numpy as np
import pytest

from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.cost.collectives import collective_seconds, group_of
from triaxial.plan.cost.placement import place
from triaxial.plan.layout import Layout, ScheduleKind, parse_layout
from triaxial.plan.layout_table import SCHEDULES, layout_table
from triaxial.plan.pipeline.schedule import Durations, build_schedule
from triaxial.plan.pipeline.simulate import StageCosts, Transfer, simulate
from triaxial.plan.training.hops import hops_of, tier_seconds
from triaxial.plan.training.pipeline_seconds import transfer_seconds
from triaxial.plan.training.shared_processors import shared_pipeline_seconds, shared_waiting_seconds
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
    assert float(hops_of(MODEL, WORK, table, place(CLUSTER, table)).farthest[0]) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["tp=4,pp=4,mb=1", "tp=2,pp=8,mb=1"])
def test_a_hop_costs_what_the_links_that_it_crosses_cost(text: str) -> None:
    """One hop of two nodes' pipeline leaves a node, all others stay inside; every message goes in parts."""
    layout = parse_layout(text)
    table = layout_table([layout])
    hops = hops_of(MODEL, WORK, table, place(CLUSTER, table))
    sizes = {axis: getattr(layout, axis) for axis in layout.order.split("-")}
    pp, tp = (group_of(CLUSTER, sizes, axis) for axis in ("pp", "tp"))
    near, far = (
        float(collective_seconds(CLUSTER, "send_recv", OUTPUT / layout.tp, group)) for group in (pp.within(0), pp)
    )
    gathered = float(collective_seconds(CLUSTER, "all_gather", OUTPUT, tp))
    assert near < far / 2
    assert hops.chain[0] == pytest.approx((layout.pp - 2) * near + far + (layout.pp - 1) * gathered)
    assert hops.farthest[0] == pytest.approx(far + gathered)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"])
@pytest.mark.parametrize(("nodes", "tp", "exact"), [(1, 1, True), (4, 8, True), (2, 2, False), (4, 4, False)])
def test_transfers_cost_what_they_do_in_the_played_schedule(
    schedule: ScheduleKind, nodes: int, tp: int, exact: bool
) -> None:
    """Equal stages, so that nothing but hops differs: all inside a node, all between nodes, or some of each, where the
    form is short by up to a thousandth of the step."""
    cluster = load_cluster(f"{nodes}x8xH100-SXM")
    pp, vpp, count = 8 * nodes // tp, 2 if schedule == "interleaved" else 1, 32
    table = layout_table([Layout(tp=tp, pp=pp, vpp=vpp, schedule=schedule, mb=1)])
    placement = place(cluster, table)
    by_tier, members = tier_seconds(MODEL, WORK, table, placement)[:, 0], placement.members("pp")[:, 0]
    crossed = [np.argmax(a // members == b // members) for a, b in pairwise([*range(pp)] * vpp)]
    stage = Durations(0.1 / vpp, 0.11 / vpp, 0.08 / vpp)
    play = build_schedule(schedule, ranks=pp, micro_batches=count, virtual_stages=vpp, durations=stage)
    costs = StageCosts.uniform(pp * vpp, stage)
    transfers = tuple(Transfer(latency_s=float(by_tier[tier])) for tier in crossed)
    alone, whole = (simulate(play, c).step_time_s for c in (costs, replace(costs, transfers=transfers)))
    hops = hops_of(MODEL, WORK, table, placement)
    closed = transfer_seconds(table.schedule, table.vpp, np.array([count]), hops, overlapped=True)[0]
    assert closed == pytest.approx(whole - alone, abs=(0.0001 if exact else 0.001) * whole)
    assert whole - alone > 0


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


def test_the_last_gradient_travels_while_nothing_is_left_to_compute() -> None:
    """Two stages that keep both processors busy: of all hops of many micro-batches, one is waited for."""
    table, hop = layout_table([parse_layout("pp=2,mb=1")]), np.array([0.01])
    bubble, exposed = shared_waiting_seconds(2, table, np.array([50]), np.array([1.0]), np.array([2.0]), hop)
    assert bubble == pytest.approx(0.0)
    assert exposed == pytest.approx(hop)


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
