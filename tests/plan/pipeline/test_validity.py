"""The validator against a second opinion: whatever is done to a valid table, both agree on whether it still runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.plan.layout import parse_layout
from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.schedule import Schedule, ScheduleKind, build_schedule
from triaxial.plan.pipeline.validity import check_fit, check_schedule


def can_run(schedule: Schedule) -> bool:
    """Whether the table is complete and plays to its end, found by trying every rank again and again."""
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    for rank, actions in enumerate(schedule.ranks):
        for kind, stage, micro_batch in actions:
            if not (0 <= stage < schedule.num_stages and schedule.placement[stage] == rank):
                return False
            kinds[stage, micro_batch].append(kind)
    everything = {(s, m) for s in range(schedule.num_stages) for m in range(schedule.num_micro_batches)}
    if set(kinds) != everything or not all(sorted(done) in (["B", "F"], ["F", "I", "W"]) for done in kinds.values()):
        return False

    done: set[tuple[str, int, int]] = set()

    def ready(action: Action) -> bool:
        kind, stage, micro_batch = action
        if kind == "F":
            return stage == 0 or ("F", stage - 1, micro_batch) in done
        if kind == "W":
            return ("I", stage, micro_batch) in done
        behind = stage + 1 == schedule.num_stages or bool(
            {("B", stage + 1, micro_batch), ("I", stage + 1, micro_batch)} & done
        )
        return ("F", stage, micro_batch) in done and behind

    left = [list(actions) for actions in schedule.ranks]
    moving = True
    while moving:
        moving = False
        for actions in left:
            while actions and ready(actions[0]):
                done.add(tuple(actions.pop(0)))
                moving = True
    return not any(left)


def accepted(schedule: Schedule) -> bool:
    try:
        check_schedule(schedule)
    except BadInput:
        return False
    return True


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[ScheduleKind, ...] = get_args(ScheduleKind)) -> Schedule:
    kind = draw(st.sampled_from(kinds))
    return build_schedule(kind, ranks=draw(st.integers(1, 4)), micro_batches=draw(st.integers(1, 6)))


def with_rank(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    return replace(schedule, ranks=(*schedule.ranks[:rank], tuple(actions), *schedule.ranks[rank + 1 :]))


def pick(data: st.DataObject, schedule: Schedule) -> tuple[int, int]:
    """A rank and the position of one of its actions."""
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    return rank, data.draw(st.integers(0, len(schedule.ranks[rank]) - 1))


@settings(deadline=None)
@given(schedules())
def test_generated_tables_run(schedule: Schedule) -> None:
    assert can_run(schedule)
    assert accepted(schedule)


@settings(deadline=None)
@given(schedules(), st.data())
def test_a_dropped_action_is_missed_by_name(schedule: Schedule, data: st.DataObject) -> None:
    rank, at = pick(data, schedule)
    actions = list(schedule.ranks[rank])
    dropped = actions.pop(at)
    with pytest.raises(BadInput, match=rf"^rank {rank}: {dropped} \(.*\) is missing$"):
        check_schedule(with_rank(schedule, rank, actions))


@settings(deadline=None)
@given(schedules(), st.data())
def test_a_repeated_action_is_found(schedule: Schedule, data: st.DataObject) -> None:
    rank, at = pick(data, schedule)
    actions = list(schedule.ranks[rank])
    repeated = actions[at]
    actions.insert(data.draw(st.integers(0, len(actions))), repeated)
    with pytest.raises(BadInput, match=rf"^rank {rank}: {repeated} \(.*\) is there twice$"):
        check_schedule(with_rank(schedule, rank, actions))


@settings(deadline=None)
@given(schedules().filter(lambda schedule: schedule.num_ranks > 1), st.data())
def test_an_action_on_the_wrong_rank_is_sent_home(schedule: Schedule, data: st.DataObject) -> None:
    rank, at = pick(data, schedule)
    actions = list(schedule.ranks[rank])
    moved = actions.pop(at)
    other = data.draw(st.integers(0, schedule.num_ranks - 1).filter(lambda other: other != rank))
    theirs = list(schedule.ranks[other])
    theirs.insert(data.draw(st.integers(0, len(theirs))), moved)
    with pytest.raises(BadInput, match=rf"^rank {other}: {moved} \(.*\) belongs to rank {rank}, which holds stage"):
        check_schedule(with_rank(with_rank(schedule, rank, actions), other, theirs))


@settings(deadline=None)
@given(schedules(), st.data())
def test_an_action_of_another_stage_or_micro_batch_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    rank, at = pick(data, schedule)
    actions = list(schedule.ranks[rank])
    stage = data.draw(st.integers(0, schedule.num_stages))
    micro_batch = data.draw(st.integers(0, schedule.num_micro_batches))
    actions[at] = actions[at]._replace(stage=stage, micro_batch=micro_batch)
    changed = with_rank(schedule, rank, actions)
    assert accepted(changed) == can_run(changed) == (changed == schedule)


@settings(deadline=None)
@given(schedules(), st.data())
def test_whole_and_split_backward_exclude_each_other(schedule: Schedule, data: st.DataObject) -> None:
    rank, at = pick(data, schedule)
    actions = list(schedule.ranks[rank])
    other = data.draw(st.sampled_from("BIW"))
    actions.insert(data.draw(st.integers(0, len(actions))), actions[at]._replace(kind=other))
    with pytest.raises(BadInput, match=rf"^rank {rank}: .* (repeats a part of|is there twice)"):
        check_schedule(with_rank(schedule, rank, actions))


@settings(deadline=None)
@given(schedules(kinds=("zb-h1", "zb-h2", "zb-v")), st.data())
def test_a_weight_gradient_before_its_input_gradient_deadlocks(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    actions = list(schedule.ranks[rank])
    of_weight = data.draw(st.sampled_from([action for action in actions if action.kind == "W"]))
    actions.remove(of_weight)
    actions.insert(data.draw(st.integers(0, actions.index(of_weight._replace(kind="I")))), of_weight)
    with pytest.raises(
        BadInput, match=rf"would deadlock: .*{of_weight} \(.*\) needs {of_weight._replace(kind='I')} \("
    ):
        check_schedule(with_rank(schedule, rank, actions))


@settings(max_examples=500, deadline=None)
@given(schedules(), st.data())
def test_any_swap_is_judged_rightly(schedule: Schedule, data: st.DataObject) -> None:
    swapped = schedule
    for _ in range(data.draw(st.integers(1, 3))):
        rank, at = pick(data, swapped)
        actions = list(swapped.ranks[rank])
        to = data.draw(st.integers(0, len(actions) - 1))
        actions[at], actions[to] = actions[to], actions[at]
        swapped = with_rank(swapped, rank, actions)
    assert accepted(swapped) == can_run(swapped)


def test_a_harmless_swap_is_accepted() -> None:
    schedule = build_schedule("1f1b", ranks=4, micro_batches=8)
    first, second, *others = schedule.ranks[0]
    assert accepted(with_rank(schedule, 0, [second, first, *others]))


def test_a_deadlock_across_ranks_is_told_as_the_circle_that_it_is() -> None:
    ranks = (
        (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
        (Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1)),
    )
    with pytest.raises(BadInput) as refusal:
        check_schedule(Schedule("own", 2, (0, 1), ranks))
    assert str(refusal.value) == (
        "the schedule would deadlock: "
        "rank 0: 0B0 (backward of micro-batch 0 on stage 0) needs 1B0 (backward of micro-batch 0 on stage 1), "
        "which rank 1 does later; "
        "rank 1: 1F1 (forward of micro-batch 1 on stage 1) needs 0F1 (forward of micro-batch 1 on stage 0), "
        "which rank 0 does later"
    )


def test_one_stage_may_split_its_backward_while_others_do_not() -> None:
    ranks = (
        (Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)),
        (Action("F", 1, 0), Action("B", 1, 0)),
        (Action("F", 2, 0), Action("I", 2, 0), Action("W", 2, 0)),
    )
    assert check_schedule(Schedule("own", 1, (0, 1, 2), ranks)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("placement", "ranks", "micro_batches", "says"),
    [
        ((0, 2), ((), ()), 1, "stage 1 is placed on rank 2, but there are 2 ranks"),
        ((0, 0), ((), ()), 1, "rank 1 holds no stage"),
        ((), (), 1, "there is no stage"),
        ((0,), ((),), 0, "at least 1 micro-batch, not 0"),
        ((0,), ((Action("F", 1, 0),),), 1, r"rank 0: 1F0 \(.*\): there are only 1 stages"),
        ((0,), ((Action("F", 0, 1),),), 1, r"rank 0: 0F1 \(.*\): there are only 1 micro-batches"),
        ((0,), ((Action("F", 0, 0),),), 1, r"rank 0: 0B0 \(.*\) is missing"),
    ],
)
def test_what_no_rank_can_hold_is_refused(
    placement: tuple[int, ...], ranks: tuple[tuple[Action, ...], ...], micro_batches: int, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        check_schedule(Schedule("own", micro_batches, placement, ranks))


@pytest.mark.parametrize(
    ("layout", "micro_batches", "words"),
    [
        ("pp=4", 4, "has 2 ranks, but the layout has pp=4"),
        ("pp=2", 8, "has 4 micro-batches, but a step of this layout and global batch has 8"),
        ("pp=2,cut=3+4", 4, "cut is of 2 stages, but the table has 4"),
        ("pp=2", 4, "has 4 stages, more than the model's 3 blocks"),
    ],
)
def test_a_table_for_another_job_is_refused(layout: str, micro_batches: int, words: str) -> None:
    table = build_schedule("zb-v", ranks=2, micro_batches=4)
    check_fit(table, parse_layout("pp=2"), 4, num_blocks=4)
    with pytest.raises(BadInput, match=words):
        check_fit(table, parse_layout(layout), micro_batches, num_blocks=3)
