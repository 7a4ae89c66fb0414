"""Generators: complete, within their memory, as short as published; and the table as JSON."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from triaxial import BadInput
from triaxial.plan.pipeline.action import Action, parse_action
from triaxial.plan.pipeline.schedule import EQUAL, Durations, Schedule, ScheduleKind, build_schedule
from triaxial.plan.pipeline.simulate import StageCosts, Timeline, simulate
from triaxial.plan.pipeline.validity import check_schedule

KINDS = get_args(ScheduleKind)
SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 7), (4, 2), (4, 3), (4, 8), (5, 5), (8, 32), (7, 20)]


def timeline(schedule: Schedule, of_rank: Durations = EQUAL) -> Timeline:
    part = schedule.num_ranks / schedule.num_stages
    of_stage = Durations(of_rank.forward * part, of_rank.input * part, of_rank.weight * part)
    return simulate(schedule, StageCosts.uniform(schedule.num_stages, of_stage)).timeline


def text(schedule: Schedule, rank: int) -> str:
    return " ".join(map(str, schedule.ranks[rank]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_every_kind_runs_at_every_size(kind: ScheduleKind, ranks: int, micro_batches: int) -> None:
    schedule = build_schedule(kind, ranks=ranks, micro_batches=micro_batches)
    check_schedule(schedule)
    assert (schedule.num_ranks, schedule.num_micro_batches, schedule.kind) == (ranks, micro_batches, kind)
    per_micro_batch = 3 if kind.startswith("zb") else 2
    assert sum(map(len, schedule.ranks)) == schedule.num_stages * micro_batches * per_micro_batch


@pytest.mark.parametrize("virtual_stages", [2, 3, 4])
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_interleaved_runs_with_any_number_of_virtual_stages(
    ranks: int, micro_batches: int, virtual_stages: int
) -> None:
    schedule = build_schedule("interleaved", ranks=ranks, micro_batches=micro_batches, virtual_stages=virtual_stages)
    check_schedule(schedule)
    assert schedule.placement == tuple(stage % ranks for stage in range(ranks * virtual_stages))


def test_one_forward_one_backward_as_drawn_in_its_paper() -> None:
    schedule = build_schedule("1f1b", ranks=4, micro_batches=8)
    assert text(schedule, 0) == "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7"
    assert text(schedule, 3) == "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7"


def test_zero_bubble_places_two_stages_as_a_v() -> None:
    assert build_schedule("zb-v", ranks=3, micro_batches=6).placement == (0, 1, 2, 2, 1, 0)


def test_zb_h2_as_drawn_in_its_paper() -> None:
    """arXiv 2401.10241, figure 3: the first rank starts seven forwards ahead, the last one a single one."""
    schedule = build_schedule("zb-h2", ranks=4, micro_batches=8)
    assert text(schedule, 0).startswith("0F0 0F1 0F2 0F3 0F4 0F5 0F6 0I0 0W0 0F7 0I1 0W1 0I2 0W2")
    assert text(schedule, 3).startswith("3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3F4 3I4 3F5 3I5 3F6 3I6 3W0 3F7 3I7")


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 12), (8, 32), (5, 17)])
def test_activations_in_flight(ranks: int, micro_batches: int) -> None:
    def peaks(kind: ScheduleKind) -> tuple[int, ...]:
        return build_schedule(kind, ranks=ranks, micro_batches=micro_batches).peak_activations

    assert peaks("gpipe") == (micro_batches,) * ranks
    assert peaks("1f1b") == tuple(range(ranks, 0, -1))
    assert peaks("zb-h1") == (ranks,) * ranks, "no more than the first rank holds under 1F1B"
    assert peaks("zb-h2") == (2 * ranks - 1,) * ranks
    assert peaks("zb-v") == (2 * ranks,) * ranks, "of half a rank's layers each: 1F1B's memory"


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 4), (3, 7), (4, 8), (8, 16), (8, 32), (16, 48)])
def test_zero_bubble_is_zero(ranks: int, micro_batches: int) -> None:
    """With F = I = W, ranks that start one after the other are never idle until they end (arXiv 2401.10241)."""
    for kind in ("zb-h2", "zb-v"):
        assert timeline(build_schedule(kind, ranks=ranks, micro_batches=micro_batches)).bubble_rate == pytest.approx(0)


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 8), (8, 32), (5, 17)])
def test_zero_bubble_h_formulas(ranks: int, micro_batches: int, weight: float) -> None:
    """Bubbles (p-1)(TF+TB-TW) and (p-1)(TF+TB-2TW) of arXiv 2401.10241, table 2."""
    durations = Durations(1.0, 1.0, weight)
    for kind, times_weight in (("zb-h1", 1), ("zb-h2", 2)):
        bubble = (ranks - 1) * (2.0 - times_weight * weight)
        cost = micro_batches * (2.0 + weight) + bubble
        rate = timeline(build_schedule(kind, ranks=ranks, micro_batches=micro_batches), durations).bubble_rate
        assert rate == pytest.approx(bubble / cost, abs=1e-9)


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("kind", ["zb-h1", "zb-h2"])
def test_zero_bubble_h_keeps_any_memory_limit(kind: ScheduleKind, limit: int) -> None:
    schedule = build_schedule(kind, ranks=4, micro_batches=12, memory_limit=limit)
    assert max(check_schedule(schedule)) == min(limit, 4 if kind == "zb-h1" else 7)


def test_more_memory_never_makes_zb_h2_slower() -> None:
    steps = [
        timeline(build_schedule("zb-h2", ranks=4, micro_batches=12, memory_limit=limit)).bubble_rate
        for limit in range(1, 8)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == pytest.approx(0)


def test_a_memory_limit_that_a_kind_cannot_keep_is_refused_with_what_it_takes() -> None:
    with pytest.raises(BadInput, match=r"zb-v on 4 ranks .* holds 8 activations .* limit of 7: allow 8"):
        build_schedule("zb-v", ranks=4, micro_batches=12, memory_limit=7)
    assert build_schedule("1f1b", ranks=4, micro_batches=12, memory_limit=4).peak_activations == (4, 3, 2, 1)


@pytest.mark.parametrize("kind", ["zb-h1", "zb-h2", "zb-v"])
@pytest.mark.parametrize("durations", [Durations(), Durations(1, 0.5, 2), Durations(0.7, 1.3, 1)])
def test_few_micro_batches_do_not_wait_behind_weight_gradients(kind: ScheduleKind, durations: Durations) -> None:
    """The shortest conceivable step: the first micro-batch there, the last back, and the first stage's last W."""
    ranks, micro_batches = 8, 2
    schedule = build_schedule(kind, ranks=ranks, micro_batches=micro_batches, durations=durations)
    there_and_back = ranks * (durations.forward + durations.input)
    slower = max(durations.forward, durations.input)
    bound = there_and_back + (micro_batches - 1) * slower + micro_batches * durations.weight
    assert timeline(schedule, durations).step_time_s <= bound + 1e-9


def test_weight_gradients_placed_by_durations_beat_the_published_order_where_w_is_long() -> None:
    durations = Durations(1.0, 0.5, 2.0)
    published = build_schedule("zb-v", ranks=8, micro_batches=16)
    placed = build_schedule("zb-v", ranks=8, micro_batches=16, durations=durations)
    assert timeline(published, durations).bubble_rate > 0.04
    assert timeline(placed, durations).bubble_rate == pytest.approx(0)
    assert max(placed.peak_activations) == 16


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("1f1b", {"ranks": 0, "micro_batches": 4}, "ranks must be at least 1, not 0"),
        ("1f1b", {"ranks": 2, "micro_batches": 0}, "micro-batches must be at least 1, not 0"),
        ("zb-h2", {"ranks": 2, "micro_batches": 4, "memory_limit": 0}, "memory limit must be at least 1, not 0"),
        ("1f1b", {"ranks": 2, "micro_batches": 4, "virtual_stages": 2}, "1f1b needs 1 virtual stage on each rank"),
        ("interleaved", {"ranks": 2, "micro_batches": 4, "virtual_stages": 1}, "at least 2 virtual stages"),
        ("zb-v", {"ranks": 2, "micro_batches": 4, "virtual_stages": 3}, "zb-v needs 2 virtual stages"),
    ],
)
def test_impossible_numbers_are_refused(kind: ScheduleKind, arguments: dict[str, int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        build_schedule(kind, **arguments)


def test_one_rank_may_have_one_stage_under_every_kind() -> None:
    for kind in KINDS:
        schedule = build_schedule(kind, ranks=1, micro_batches=3, virtual_stages=1)
        assert (schedule.placement, check_schedule(schedule)) == ((0,), (3 if kind == "gpipe" else 1,))


@pytest.mark.parametrize("kind", KINDS)
def test_json_brings_back_the_same_table(kind: ScheduleKind) -> None:
    schedule = build_schedule(kind, ranks=3, micro_batches=5)
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_a_table_of_ones_own() -> None:
    own = {
        "num_micro_batches": 1,
        "placement": [0, 1],
        "ranks": [{"actions": ["0F0", "0B0"]}, {"actions": ["1F0", "1B0"]}],
    }
    schedule = Schedule.from_json(json.dumps(own))
    assert schedule.ranks[1] == (Action("F", 1, 0), Action("B", 1, 0))
    assert check_schedule(schedule) == (1, 1)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("[", "Invalid JSON"),
        ('{"placement": [0], "ranks": []}', "num_micro_batches: Field required"),
        (
            '{"num_micro_batches": 0, "placement": [0], "ranks": []}',
            "num_micro_batches: Input should be greater than 0",
        ),
        ('{"num_micro_batches": 1, "placement": [-1], "ranks": []}', r"placement\.0: Input should be greater"),
        (
            '{"num_micro_batches": 1, "placement": [0], "ranks": [{"actions": ["F00"]}]}',
            "'F00' is no action; write .* 3F12",
        ),
        (
            '{"num_micro_batches": 1, "placement": [0], "ranks": [{"actions": [3]}]}',
            r"ranks\.0\.actions\.0: Input should be",
        ),
    ],
)
def test_a_malformed_table_is_refused_in_one_sentence(table: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as refusal:
        Schedule.from_json(table)
    assert "\n" not in str(refusal.value)


def test_actions_are_written_like_3f12() -> None:
    assert str(Action("F", 3, 12)) == "3F12"
    assert parse_action("10W0") == Action("W", 10, 0)
