"""The table format against torch's own: torch's tables run on our executor, and ours on torch's runtime."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from tests.parity.test_schedules import case_of
from tests.parity.training import assert_same, train_everywhere
from tests.world import World
from triaxial import BadInput
from triaxial.plan.layout import Layout, ScheduleKind
from triaxial.plan.pipeline.action import parse_action
from triaxial.plan.pipeline.schedule import Schedule, build_schedule
from triaxial.plan.pipeline.validity import check_schedule

WIDTH = 4


@dataclass(frozen=True)
class TorchKind:
    """A schedule class of torch: stages on each rank, and whether they are placed as a V."""

    name: str
    cls: type
    stages_per_rank: int
    v_shaped: bool = False

    def placement(self, ranks: int) -> tuple[int, ...]:
        if self.v_shaped:
            return (*range(ranks), *reversed(range(ranks)))
        return tuple(range(ranks)) * self.stages_per_rank


KINDS = {
    kind.name: kind
    for kind in (
        TorchKind("1f1b", Schedule1F1B, 1),
        TorchKind("interleaved", ScheduleInterleaved1F1B, 2),
        TorchKind("interleaved of 3", ScheduleInterleaved1F1B, 3),
        TorchKind("zero bubble", ScheduleInterleavedZeroBubble, 1),
        TorchKind("interleaved zero bubble", ScheduleInterleavedZeroBubble, 2),
        TorchKind("zb-v", ScheduleZBVZeroBubble, 2, v_shaped=True),
    )
}


def torch_table(rank: int, name: str, num_micro_batches: int) -> Schedule:
    """The table that a schedule object of torch holds, without its gaps, sends and reductions."""
    kind, ranks = KINDS[name], dist.get_world_size()
    placement = kind.placement(ranks)
    stages = [
        PipelineStage(nn.Identity(), stage, len(placement), torch.device("cpu"))
        for stage, place in enumerate(placement)
        if place == rank
    ]
    schedule = kind.cls(stages[0] if kind.cls is Schedule1F1B else stages, num_micro_batches)
    order = schedule._get_pipeline_order() if kind.cls is Schedule1F1B else schedule.pipeline_order
    actions = tuple(
        tuple(parse_action(str(action)) for action in order[r] if action is not None and action.is_compute_op)
        for r in range(ranks)
    )
    return Schedule(f"torch's {name}", num_micro_batches, placement, actions)


def test_the_last_rank_of_torchs_1f1b_picture_is_off_by_one(world: World) -> None:
    """torch runs its 1F1B by a loop of its own; the table is for its visualiser alone. The validator sees the slip."""
    table = world.run(2, torch_table, "1f1b", 4)[0]
    with pytest.raises(BadInput, match=r"rank 1: 1F4 .*: there are only 4 micro-batches"):
        check_schedule(table)
    *others, last = table.ranks
    mended = (*others, tuple(a._replace(micro_batch=a.micro_batch - (a.kind == "F")) for a in last))
    assert mended == build_schedule("1f1b", ranks=2, micro_batches=4).ranks


@pytest.mark.parametrize(
    ("name", "pp", "num_micro_batches"),
    [
        (name, pp, num)
        for (name, kind), (pp, num) in product(KINDS.items(), [(2, 4), (2, 8), (4, 8)])
        if name != "1f1b" and pp * kind.stages_per_rank <= 9  # blocks of the model
    ],
)
def test_torchs_tables_run_on_our_executor(world: World, name: str, pp: int, num_micro_batches: int) -> None:
    table = world.run(pp, torch_table, name, num_micro_batches)[0]
    check_schedule(table)
    assert table.splits_backward == ("zero bubble" in name or name == "zb-v")
    layout = Layout(pp=pp)
    case = case_of(layout, num_micro_batches, layers=7, tied=True)
    outcome = train_everywhere(world, case, layout, table)
    assert_same(outcome, train_everywhere(world, case, Layout(mb=num_micro_batches)))


def make_stage(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


def make_batch(num_micro_batches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, target = torch.randn(2, 3 * num_micro_batches, WIDTH, dtype=torch.float64, generator=generator)
    return x, target


def loss_function(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def run_on_torch(rank: int, schedule: Schedule) -> dict[int, list[Tensor]]:
    """Run a table of ours on torch's runtime: the gradients of this rank's stages."""
    modules = {stage: make_stage(stage) for stage, place in enumerate(schedule.placement) if place == rank}
    stages = [
        PipelineStage(module, stage, schedule.num_stages, torch.device("cpu")) for stage, module in modules.items()
    ]
    runtime = _PipelineScheduleRuntime(stages, schedule.num_micro_batches, loss_function, scale_grads=False)
    runtime._prepare_schedule_with_comms(
        {r: [_Action.from_str(str(action)) for action in actions] for r, actions in enumerate(schedule.ranks)}
    )
    x, target = make_batch(schedule.num_micro_batches)
    inputs = (x,) if 0 in modules else ()
    ends = {"target": target, "losses": []} if schedule.num_stages - 1 in modules else {}
    runtime.step(*inputs, **ends)
    return {stage: [p.grad for p in module.parameters()] for stage, module in modules.items()}


@pytest.mark.parametrize(
    ("kind", "vpp"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2)],
)
@pytest.mark.parametrize(("pp", "num_micro_batches"), [(2, 4), (4, 8)])
def test_our_tables_run_on_torchs_runtime(
    world: World, kind: ScheduleKind, vpp: int, pp: int, num_micro_batches: int
) -> None:
    schedule = build_schedule(kind, ranks=pp, micro_batches=num_micro_batches, virtual_stages=vpp)
    whole = nn.Sequential(*map(make_stage, range(schedule.num_stages)))
    x, target = make_batch(num_micro_batches)
    loss_function(whole(x), target).backward()
    stages: dict[int, list[Tensor]] = {}
    for mine in world.run(pp, run_on_torch, schedule):
        stages |= mine
    assert sorted(stages) == list(range(schedule.num_stages))
    for stage, module in enumerate(whole):
        for gradient, parameter in zip(stages[stage], module.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)
