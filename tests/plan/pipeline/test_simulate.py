"""The simulator against closed forms, published figures and timelines worked out by hand."""

from __future__ import annotations

import math

import pytest

from triaxial import BadInput
from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.schedule import Durations, Schedule, ScheduleKind, build_schedule
from triaxial.plan.pipeline.simulate import Simulation, StageCosts, Transfer, simulate

SIZES = [(1, 1), (1, 6), (2, 2), (3, 3), (4, 4), (4, 9), (8, 32), (5, 17), (16, 24)]


def run(kind: ScheduleKind, ranks: int, micro_batches: int, of_rank: Durations, transfer_s: float = 0.0) -> Simulation:
    schedule = build_schedule(kind, ranks=ranks, micro_batches=micro_batches)
    part = ranks / schedule.num_stages
    of_stage = Durations(of_rank.forward * part, of_rank.input * part, of_rank.weight * part)
    return simulate(schedule, StageCosts.uniform(schedule.num_stages, of_stage, Transfer(latency_s=transfer_s)))


def times(simulation: Simulation, rank: int) -> list[tuple[str, float, float]]:
    return [(str(action), begin, end) for action, begin, end in simulation.timeline.ranks[rank]]


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_bubble_of_gpipe_and_1f1b(kind: ScheduleKind, ranks: int, micro_batches: int) -> None:
    simulation = run(kind, ranks, micro_batches, Durations(0.3, 0.4, 0.2))
    assert simulation.timeline.bubble_fraction == pytest.approx((ranks - 1) / (ranks - 1 + micro_batches))
    assert simulation.timeline.bubble_per_rank == pytest.approx((simulation.timeline.bubble_fraction,) * ranks)
    assert simulation.step_time_s == pytest.approx(0.9 * (micro_batches + ranks - 1))


def test_bubble_of_8_stages_and_32_micro_batches() -> None:
    assert f"{run('1f1b', 8, 32, Durations()).timeline.bubble_fraction:.1%}" == "17.9%"


@pytest.mark.parametrize("virtual_stages", [2, 3, 4])
@pytest.mark.parametrize(("ranks", "micro_batches"), [*SIZES, (4, 5), (4, 6), (4, 7), (8, 15), (8, 33), (3, 10)])
def test_bubble_of_interleaved(ranks: int, micro_batches: int, virtual_stages: int) -> None:
    """arXiv 2104.04473, section 2.2.2; here also where micro-batches are no multiple of the ranks."""
    schedule = build_schedule("interleaved", ranks=ranks, micro_batches=micro_batches, virtual_stages=virtual_stages)
    timeline = simulate(schedule, StageCosts.uniform(schedule.num_stages, Durations())).timeline
    assert timeline.bubble_fraction == pytest.approx((ranks - 1) / (ranks - 1 + micro_batches * virtual_stages))


# Ranks, micro-batches; ms of TF, TB, TW and Tcomm (arXiv 2401.10241, table 9; its B is the input gradient); bubble rates
# of 1F1B, ZB-H1 and ZB-H2 (table 5).
PUBLISHED = [
    pytest.param(8, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585, 0.1083), id="1.5B, m=24: bub-001, 003, 004"),
    pytest.param(8, 32, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.1242, 0.0837), id="1.5B, m=32: bub-007, 009, 010"),
    pytest.param(8, 64, (18.546, 18.097, 9.321, 0.762), (0.124, 0.0674, 0.0444), id="1.5B, m=64: bub-013, 015, 016"),
    pytest.param(8, 24, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698), id="6.2B, m=24: bub-019, 021, 022"),
    pytest.param(8, 32, (29.802, 29.428, 19.53, 0.577), (0.1898, 0.1045, 0.0559), id="6.2B, m=32: bub-025, 027, 028"),
    pytest.param(8, 64, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.0554, 0.0294), id="6.2B, m=64: bub-031, 033, 034"),
    pytest.param(16, 48, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1397, 0.0672), id="14.6B, m=48: bub-037, 039, 040"),
    pytest.param(16, 64, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.1088, 0.0516), id="14.6B, m=64: bub-043, 045, 046"),
    pytest.param(
        16, 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266), id="14.6B, m=128: bub-049, 051, 052"
    ),
    pytest.param(32, 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1421, 0.0641), id="28.3B, m=96: bub-055, 057, 058"),
    pytest.param(
        32, 128, (10.408, 10.204, 7.703, 0.408), (0.2168, 0.1106, 0.049), id="28.3B, m=128: bub-061, 063, 064"
    ),
    pytest.param(
        32, 256, (10.402, 10.248, 7.698, 0.46), (0.1352, 0.0594, 0.0257), id="28.3B, m=256: bub-067, 069, 070"
    ),
]


@pytest.mark.parametrize(("ranks", "micro_batches", "milliseconds", "rates"), PUBLISHED)
def test_published_bubble_rates(
    ranks: int, micro_batches: int, milliseconds: tuple[float, ...], rates: tuple[float, ...]
) -> None:
    forward, of_input, of_weight, transfer = milliseconds
    for kind, published in zip(("1f1b", "zb-h1", "zb-h2"), rates):
        simulation = run(kind, ranks, micro_batches, Durations(forward, of_input, of_weight), transfer)
        assert simulation.timeline.bubble_rate == pytest.approx(published, abs=0.51e-4), kind


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "virtual_stages", "milliseconds", "published"),
    [
        pytest.param(8, 24, 3, (18.522, 18.086, 9.337, 0.601), 0.1055, id="1.5B: bub-002"),
        pytest.param(8, 32, 4, (29.802, 29.428, 19.53, 0.577), 0.0628, id="6.2B: bub-026"),
        pytest.param(16, 48, 3, (11.347, 11.248, 8.132, 0.377), 0.1104, id="14.6B: bub-038"),
        pytest.param(32, 96, 2, (10.419, 10.207, 7.715, 0.408), 0.1493, id="28.3B: bub-056"),
    ],
)
def test_published_bubble_rate_of_interleaved_lacks_a_wait(
    ranks: int, micro_batches: int, virtual_stages: int, milliseconds: tuple[float, ...], published: float
) -> None:
    forward, of_input, of_weight, transfer = milliseconds
    schedule = build_schedule("interleaved", ranks=ranks, micro_batches=micro_batches, virtual_stages=virtual_stages)
    of_stage = Durations(forward / virtual_stages, of_input / virtual_stages, of_weight / virtual_stages)
    costs = StageCosts.uniform(schedule.num_stages, of_stage, Transfer(latency_s=transfer))
    step_s = simulate(schedule, costs).step_time_s
    assert played_by_hand(schedule, of_stage, transfer, every_wait=True) == pytest.approx(step_s)
    cost = played_by_hand(schedule, of_stage, transfer, every_wait=False)
    assert cost == pytest.approx(step_s - ranks * transfer), "one transfer fewer per rank"
    assert 1 - micro_batches * (forward + of_input + of_weight) / cost == pytest.approx(published, abs=0.51e-4)


def played_by_hand(schedule: Schedule, of_stage: Durations, transfer: float, *, every_wait: bool) -> float:
    """The step as the authors estimate it, or with every wait.

    Their program (github.com/sail-sg/zero-bubble-pipeline-parallelism, megatron/core/pipeline_parallel/efficiency.py)
    lets only the first micro-batch of each group wait for the message from the last rank to the first, and back.
    """
    seconds = {"F": of_stage.forward, "B": of_stage.input + of_stage.weight}
    turns_over = {"F": 0, "B": schedule.num_ranks - 1}  # the rank on which the next virtual stage begins
    end: dict[Action, float] = {}
    now = [0.0] * schedule.num_ranks
    while len(end) < sum(map(len, schedule.ranks)):
        for rank, actions in enumerate(schedule.ranks):
            action = actions[sum(done in end for done in actions)] if actions[-1] not in end else None
            if action is None:
                continue
            kind, stage, micro_batch = action
            needed = Action(kind, stage - 1 if kind == "F" else stage + 1, micro_batch)
            if 0 <= needed.stage < schedule.num_stages:
                if needed not in end:
                    continue
                if every_wait or rank != turns_over[kind] or micro_batch % schedule.num_ranks == 0:
                    now[rank] = max(now[rank], end[needed] + transfer)
            end[action] = now[rank] = now[rank] + seconds[kind]
    return max(now)


def test_begin_and_end_of_every_action() -> None:
    costs = StageCosts(forward_s=(1.0, 2.0), input_s=(1.0, 1.0), weight_s=(0.5, 3.0), backward_s=(1.25, 4.0))
    simulation = simulate(build_schedule("1f1b", ranks=2, micro_batches=2), costs)
    assert times(simulation, 0) == [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 7, 8.25), ("0B1", 13, 14.25)]
    assert times(simulation, 1) == [("1F0", 1, 3), ("1B0", 3, 7), ("1F1", 7, 9), ("1B1", 9, 13)]
    assert simulation.timeline.busy_s == (4.5, 12.0)
    assert simulation.timeline.bubble_fraction == pytest.approx(1 - 16.5 / 2 / 14.25)
    assert simulation.timeline.bubble_rate == pytest.approx(1 - 12 / 14.25)


def test_a_whole_backward_takes_both_gradients_unless_it_says_otherwise() -> None:
    costs = StageCosts(forward_s=(1.0,), input_s=(2.0,), weight_s=(4.0,))
    assert simulate(build_schedule("1f1b", ranks=1, micro_batches=1), costs).step_time_s == 7.0
    assert simulate(build_schedule("zb-h1", ranks=1, micro_batches=1), costs).step_time_s == 7.0


def test_messages_take_turns_on_a_link_and_then_their_latency() -> None:
    transfer = Transfer(num_bytes=300, latency_s=0.25, bytes_per_s=100)
    costs = StageCosts.uniform(2, Durations(1.0, 1.0, 1.0), transfer)
    simulation = simulate(build_schedule("gpipe", ranks=2, micro_batches=2), costs)
    assert times(simulation, 0)[:2] == [("0F0", 0, 1), ("0F1", 1, 2)]
    assert times(simulation, 1)[:2] == [("1F0", 4.25, 5.25), ("1F1", 7.25, 8.25)], "0F1's message left at 4"
    assert times(simulation, 0)[2:] == [("0B0", 13.5, 15.5), ("0B1", 16.5, 18.5)], "1B0 10.25, + 3.25; then + 3"


def test_a_blocked_sender_stands_still_until_its_message_has_arrived() -> None:
    transfer = Transfer(num_bytes=300, latency_s=0.25, bytes_per_s=100)
    costs = StageCosts.uniform(2, Durations(1.0, 1.0, 1.0), transfer)
    simulation = simulate(build_schedule("gpipe", ranks=2, micro_batches=2), costs, sender_blocked=True)
    assert times(simulation, 0)[:2] == [("0F0", 0, 1), ("0F1", 4.25, 5.25)]
    assert times(simulation, 1)[:2] == [("1F0", 4.25, 5.25), ("1F1", 8.5, 9.5)]


def test_nothing_is_sent_between_stages_of_one_rank() -> None:
    costs = StageCosts.uniform(4, Durations(), Transfer(latency_s=10.0))
    timeline = simulate(build_schedule("zb-v", ranks=2, micro_batches=1), costs).timeline
    begins = {str(action): begin for spans in timeline.ranks for action, begin, _ in spans}
    assert [begins[name] for name in ("0F0", "1F0", "2F0", "3F0", "3I0", "2I0")] == [0, 11, 12, 23, 24, 35]


def test_gradients_are_reduced_beside_the_work_that_is_left() -> None:
    costs = StageCosts(forward_s=(1.0,) * 4, input_s=(1.0,) * 4, weight_s=(1.0,) * 4, reduce_s=(1.0, 1.0, 2.5, 0.5))
    simulation = simulate(build_schedule("interleaved", ranks=2, micro_batches=2), costs)
    last_gradient = {action.stage: end for spans in simulation.timeline.ranks for action, _, end in spans}
    assert last_gradient == {0: 15.0, 1: 13.0, 2: 11.0, 3: 9.0}
    assert simulation.reduce_s == ((15.0, 16.0), (13.0, 14.0), (11.0, 13.5), (9.0, 9.5))
    assert (simulation.timeline.step_time_s, simulation.step_time_s) == (15.0, 16.0)


def test_reductions_of_one_rank_take_turns() -> None:
    costs = StageCosts(forward_s=(1.0, 1.0), input_s=(1.0, 1.0), weight_s=(0.0, 0.0), reduce_s=(1.0, 5.0))
    simulation = simulate(build_schedule("interleaved", ranks=1, micro_batches=1), costs)
    assert simulation.reduce_s == ((8.0, 9.0), (3.0, 8.0))


def test_the_slowest_stage_sets_the_pace() -> None:
    forward = (1.0, 1.0, 3.0, 1.0)
    costs = StageCosts(forward_s=forward, input_s=forward, weight_s=forward)
    micro_batches = 64
    for kind in ("1f1b", "zb-h1", "zb-h2"):
        simulation = simulate(build_schedule(kind, ranks=4, micro_batches=micro_batches), costs)
        assert simulation.timeline.bubble_per_rank[2] < 0.1
        assert 9.0 * micro_batches <= simulation.step_time_s <= 9.0 * micro_batches + 12.0


def test_peak_activations_come_with_the_simulation() -> None:
    assert run("1f1b", 4, 8, Durations()).peak_activations == (4, 3, 2, 1)


def test_a_table_that_cannot_run_is_refused() -> None:
    ranks = ((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0)))
    with pytest.raises(BadInput, match="would deadlock"):
        simulate(Schedule("own", 1, (0, 1), ranks), StageCosts.uniform(2, Durations()))


def test_costs_must_be_of_the_schedules_stages() -> None:
    with pytest.raises(BadInput, match="costs are of 3 stages, but the schedule has 2"):
        simulate(build_schedule("1f1b", ranks=2, micro_batches=2), StageCosts.uniform(3, Durations()))
    with pytest.raises(BadInput, match="weight_s must have 2 entries, not 1"):
        StageCosts(forward_s=(1.0, 1.0), input_s=(1.0, 1.0), weight_s=(1.0,))
    with pytest.raises(BadInput, match="transfers must have 1 entries, not 2"):
        StageCosts(forward_s=(1.0, 1.0), input_s=(1.0, 1.0), weight_s=(1.0, 1.0), transfers=(Transfer(), Transfer()))


def test_a_link_of_unlimited_bandwidth_carries_any_message_at_once() -> None:
    assert Transfer(num_bytes=1e12).wire_s == 0.0
    assert Transfer(num_bytes=1e9, bytes_per_s=50e9).wire_s == 0.02
    assert math.isinf(Transfer().bytes_per_s)
