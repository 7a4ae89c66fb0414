"""The executor: any valid table, measured timelines on one clock, and peers that die."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.parity.test_schedules import case_of
from tests.parity.training import (
    Case,
    assert_same,
    build,
    reference,
    step_batches,
    train,
    train_everywhere,
    train_over_gloo,
)
from tests.world import World
from triaxial.parallel import mesh
from triaxial.parallel import timeline as clocks
from triaxial.parallel.emulated import EmulatedStage
from triaxial.parallel.mesh import Axis, CommunicationError
from triaxial.parallel.pipeline import Pipeline
from triaxial.parallel.shared import SharedMemory
from triaxial.parallel.timeline import gather_timeline
from triaxial.plan.layout import Layout, ScheduleKind, parse_layout
from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.schedule import Schedule, build_schedule
from triaxial.plan.pipeline.simulate import Durations, StageCosts, simulate
from triaxial.plan.pipeline.timeline import Span, Timeline
from triaxial.plan.pipeline.validity import inputs_of

CPU = torch.device("cpu")
SHAPE = (16,)
UNIT_S = 0.01


def pipeline_of(rank: int, schedule: Schedule, one_host: bool = True) -> tuple[Axis, Pipeline]:
    """A rank that waits 10 ms for each of F, I and W; on hosts of their own, ranks talk through Gloo."""
    axis = Axis("pp", tuple(range(schedule.num_ranks)), rank, dist.group.WORLD)
    if one_host:
        axis.shared = SharedMemory(dist.group.WORLD, axis.ranks, rank, None)
    stages = {
        stage: EmulatedStage(UNIT_S, 2 * UNIT_S, UNIT_S, UNIT_S, SHAPE)
        for stage, place in enumerate(schedule.placement)
        if place == rank
    }
    return axis, Pipeline(schedule, axis, stages, message_shape=SHAPE, dtype=torch.float32, device=CPU)


def rehearse(rank: int, schedule: Schedule, clock_lead_s: float) -> Timeline:
    """One step; with `clock_lead_s` every rank is a machine of its own whose clock is ahead by that much times rank."""
    axis, pipeline = pipeline_of(rank, schedule)
    pipeline.run()
    dist.barrier()
    spans = pipeline.run()
    if not clock_lead_s:
        return gather_timeline(schedule, axis, spans, CPU)
    lead_s, original = clock_lead_s * rank, (clocks._machine, time.perf_counter)
    clocks._machine, time.perf_counter = lambda: rank, lambda: original[1]() + lead_s
    try:
        wrong = [Span(span.action, span.begin_s + lead_s, span.end_s + lead_s) for span in spans]
        return gather_timeline(schedule, axis, wrong, CPU)
    finally:
        clocks._machine, time.perf_counter = original


@pytest.mark.parametrize(("kind", "vpp"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)])
def test_a_measured_timeline_is_the_tables_and_keeps_its_dependencies(
    world: World, kind: ScheduleKind, vpp: int
) -> None:
    schedule = build_schedule(kind, ranks=4, micro_batches=6, virtual_stages=vpp)
    timelines = world.run(4, rehearse, schedule, 0.0)
    measured = timelines[0]
    assert all(timeline == measured for timeline in timelines), "every rank is told the same"
    assert tuple(tuple(span.action for span in spans) for spans in measured.ranks) == schedule.ranks
    end_s = {span.action: span.end_s for spans in measured.ranks for span in spans}
    for spans in measured.ranks:
        for earlier, later in pairwise(spans):
            assert earlier.end_s <= later.begin_s
        for span in spans:
            for group in inputs_of(span.action, schedule.num_stages):
                assert any(end_s.get(needed, 1e99) <= span.begin_s for needed in group)
    predicted = simulate(schedule, StageCosts.uniform(schedule.num_stages, Durations(UNIT_S, UNIT_S, UNIT_S)))
    assert measured.step_time_s >= 0.97 * predicted.step_time_s
    assert measured.step_time_s < 3 * predicted.step_time_s, "ranks work at the same time"


def test_clocks_of_different_machines_are_aligned(world: World) -> None:
    schedule = build_schedule("1f1b", ranks=4, micro_batches=4)
    measured = world.run(4, rehearse, schedule, 1000.0)[0]
    end_s = {span.action: span.end_s for spans in measured.ranks for span in spans}
    assert measured.step_time_s < 100
    for stage in range(1, 4):
        waited_s = measured.ranks[stage][0].begin_s - end_s[Action("F", stage - 1, 0)]
        assert -0.05 < waited_s < 0.5


def leave_early(rank: int, schedule: Schedule, deserter: int, one_host: bool) -> str:
    axis, pipeline = pipeline_of(rank, schedule, one_host)
    pipeline.run()
    assert axis.traffic == {"send": 4 * 16 * 4}, "one rank sends activations, the other gradients"
    if rank == deserter:
        return "left"
    try:
        pipeline.run()
    except CommunicationError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize("one_host", [True, False])
def test_a_peer_that_dies_is_named_with_rank_and_action(world: World, one_host: bool) -> None:
    schedule = build_schedule("1f1b", ranks=2, micro_batches=4)
    began = time.monotonic()
    first, second = world.run(2, leave_early, schedule, 0, one_host)
    assert first == "left"
    assert second.startswith("rank 1: receiving the input of 1F0 from pipeline rank 0 failed: ")
    first, second = world.run(2, leave_early, schedule, 1, one_host)
    assert second == "left"
    assert first.startswith("rank 0: ")
    assert "from pipeline rank 1 failed" in first or "to pipeline rank 1 failed" in first
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("text", ["pp=4,vpp=2,schedule=zb-v", "pp=2,vpp=3,schedule=interleaved", "pp=4,schedule=gpipe"])
def test_a_pipeline_across_hosts_trains_alike(world: World, text: str) -> None:
    layout = parse_layout(text)
    case = case_of(layout, 5, layers=7, tied=True)
    assert_same(train_everywhere(world, case, layout, job=train_over_gloo), reference(world, case))


def train_on_hosts_of_two(rank: int, *job: Any) -> Any:
    """`train` where neighbouring ranks share a host."""
    with mock.patch.object(mesh, "host_identity", return_value=str(rank // 2)):
        return train(rank, *job)


def sent_by(rank: int, case: Case, layout: Layout) -> int:
    """Bytes that a rank of hosts of two sends to other stages in a step."""
    with mock.patch.object(mesh, "host_identity", return_value=str(rank // 2)):
        program, _ = build(rank, case, layout)
    program.run(step_batches(program, case, 0))
    return program.mesh.pp.traffic["send"]


@pytest.mark.parametrize("text", ["tp=2,pp=2", "tp=2,pp=2,sp=1", "tp=2,pp=2,order=pp-cp-dp-tp"])
def test_tensor_parallel_ranks_of_a_host_send_each_its_part_to_the_next(world: World, text: str) -> None:
    layout = parse_layout(text)
    case = case_of(layout, 3, layers=5, tied=False)
    assert_same(train_everywhere(world, case, layout, job=train_on_hosts_of_two), reference(world, case))
    message_bytes = case.seq_len * case.spec.hidden * 8
    parts = 1 if "order" in text else 2
    assert world.run(4, sent_by, case, layout) == [3 * message_bytes // parts] * 4


@pytest.mark.parametrize("job", [train, train_over_gloo])
def test_a_table_of_ones_own_with_uneven_stages_trains_alike(world: World, job: Callable[..., Any]) -> None:
    """Two stages on the last rank, one of which backs up in halves, and an order that no generator writes."""
    schedule = Schedule.from_json(
        """{"num_micro_batches": 2, "placement": [0, 1, 1], "ranks": [
            {"actions": ["0F1", "0F0", "0B0", "0I1", "0W1"]},
            {"actions": ["1F1", "1F0", "2F0", "2I0", "1B0", "2F1", "2B1", "1I1", "2W0", "1W1"]}]}"""
    )
    layout = Layout(pp=2, dp=2, zero=3)
    case = case_of(layout, 2, layers=5, tied=True)
    outcome = train_everywhere(world, case, layout, schedule, job=job)
    assert_same(outcome, train_everywhere(world, case, Layout(mb=case.global_batch)))
