"""Every schedule trains exactly as one process does, with every kind of data and tensor parallelism.

No pair of schedule and ZeRO stage needs refusing: gradients are summed in flat buffers by explicit calls between the
actions, never by hooks that guess which backward pass is the last.
"""

from __future__ import annotations

from itertools import count, cycle, product

import pytest

from tests.parity.training import Case, assert_same, reference, tiny_spec, train_everywhere
from tests.world import World
from triaxial.plan.layout import Layout, ScheduleKind, micro_batches, parse_layout

SCHEDULES: tuple[tuple[ScheduleKind, int], ...] = (
    # kind, virtual stages on each rank
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zb-h1", 1),
    ("zb-h2", 1),
    ("zb-v", 2),
)
DATA = ({"dp": 1}, {"dp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 2}, {"dp": 2, "zero": 3})
TENSOR = ({"tp": 1}, {"tp": 2}, {"tp": 2, "sp": True})
NUM_MICRO_BATCHES = (1, 4, 8)


def case_of(layout: Layout, num_micro_batches: int, layers: int, tied: bool) -> Case:
    """A job that gives every pipeline of the layout that many micro-batches."""
    spec = tiny_spec(num_layers=layers, tied_embeddings=tied)
    return Case(spec, global_batch=num_micro_batches * layout.dp * layout.mb, steps=2)


def pipelines() -> list[tuple[Layout, Case]]:
    """Every schedule with 2 and 4 ranks and 1, 4 and 8 micro-batches, without other axes."""
    chosen = []
    number = count()
    for (kind, vpp), pp, num in product(SCHEDULES, (2, 4), NUM_MICRO_BATCHES):
        layers = 7 if pp * vpp > 7 or next(number) % 2 else 5
        if pp * vpp <= layers + 2:
            layout = Layout(pp=pp, vpp=vpp, schedule=kind, mb=8 // num)
            chosen.append((layout, case_of(layout, num, layers, tied=bool(next(number) % 2))))
    return chosen


def combinations() -> list[tuple[Layout, Case]]:
    """Every schedule with every kind of data and tensor parallelism; the rest takes turns.

    With both, sequence parallelism takes turns too: eight processes on few cores take their time.
    """
    with_sp = cycle((False, False, True, True))  # asked without, then with
    numbers, layers, ties, depths = (cycle(turn) for turn in (NUM_MICRO_BATCHES, (5, 7, 7, 5), (True, False), (4, 2)))
    chosen = []
    for (kind, vpp), data, tensor in product(SCHEDULES, DATA, TENSOR):
        if data["dp"] == tensor["tp"] == 1:
            continue  # `pipelines` has them
        if data["dp"] == tensor["tp"] == 2 and next(with_sp) != tensor.get("sp", False):
            continue
        pp = next(depths) if vpp == 1 and data["dp"] * tensor["tp"] <= 2 else 2
        num = next(numbers)
        layout = Layout(pp=pp, vpp=vpp, schedule=kind, mb=1 if num == 8 else 2, **data, **tensor)
        chosen.append((layout, case_of(layout, num, next(layers), next(ties))))
    return chosen


def name_of(value: Layout | Case) -> str:
    if isinstance(value, Layout):
        return str(value)
    return f"{value.global_batch} sequences, {value.spec.num_layers} layers{', tied' * value.spec.tied_embeddings}"


@pytest.mark.parametrize(("layout", "case"), pipelines(), ids=name_of)
def test_gradients_are_the_same_under_every_schedule(world: World, layout: Layout, case: Case) -> None:
    assert_same(train_everywhere(world, case, layout), reference(world, case))


@pytest.mark.parametrize(("layout", "case"), combinations(), ids=name_of)
def test_gradients_are_the_same_under_every_schedule_with_other_axes(world: World, layout: Layout, case: Case) -> None:
    assert_same(train_everywhere(world, case, layout), reference(world, case))


@pytest.mark.parametrize(
    "text",
    [
        "pp=4,vpp=2,schedule=interleaved,dp=2,zero=3",
        "pp=4,vpp=2,schedule=zb-v,dp=2,zero=2",
        "pp=4,vpp=2,schedule=zb-v,tp=2,sp=1",
        "pp=4,schedule=zb-h2,dp=2,zero=3,recompute=full",
        "pp=2,vpp=2,schedule=zb-v,dp=2,zero=3,recompute=full",
        "pp=2,vpp=2,schedule=zb-v,tp=2,sp=1,recompute=selective",
        "pp=2,dp=4,zero=3,shard=2,schedule=zb-h1",
    ],
)
def test_deep_pipelines_recompute_and_hybrid_sharding(world: World, text: str) -> None:
    layout = parse_layout(text)
    case = case_of(layout, 4, layers=7, tied=True)
    assert micro_batches(layout, case.global_batch) == 4
    assert_same(train_everywhere(world, case, layout), reference(world, case))


def test_the_cases_cover_what_they_claim() -> None:
    cases = pipelines() + combinations()
    for kind, vpp in SCHEDULES:
        mine = [(layout, case) for layout, case in cases if (layout.schedule, layout.vpp) == (kind, vpp)]
        assert {micro_batches(layout, case.global_batch) for layout, case in mine} == set(NUM_MICRO_BATCHES)
        assert {case.spec.tied_embeddings for _, case in mine} == {True, False}
        assert {(layout.dp, layout.zero, layout.tp) for layout, _ in mine} == {
            (data["dp"], data.get("zero", 0), tensor["tp"]) for data, tensor in product(DATA, TENSOR)
        }
        assert {layout.sp for layout, _ in mine if layout.dp == 1} == {True, False}
        assert {layout.sp for layout, _ in mine if layout.dp == layout.tp == 2} == {True, False}
        assert {layout.pp for layout, _ in mine} == ({2} if vpp == 3 else {2, 4})
        assert {case.spec.num_layers for _, case in mine} == {5, 7}
    assert max(layout.world_size for layout, _ in cases) == 8
