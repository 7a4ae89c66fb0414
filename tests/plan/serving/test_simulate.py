"""The simulation against queueing theory, against itself, and at its edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.serving.stepping import ToyCost
from triaxial import BadInput
from triaxial.plan.serving.simulation.clock import Clock
from triaxial.plan.serving.simulation.group import Group
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.served import Step
from triaxial.plan.serving.simulation.simulate import replay, simulate
from triaxial.plan.serving.traffic import Fixed, LogNormal, Traffic, at_once, closed_loop, draw_lengths, poisson

LIMITS = Limits(max_batch=16, chunk_tokens=256, kv_tokens=100_000)
ONE = replace(LIMITS, max_batch=1, chunk_tokens=100_000)


def requests(count: int, rate: float, seed: int = 0, sigma: float = 0.6) -> Traffic:
    return poisson(*draw_lengths(LogNormal(100, sigma), LogNormal(30, sigma), count, seed), rate, seed)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_equal_requests_one_at_a_time_wait_as_in_an_m_d_1_queue(load: float) -> None:
    cost = ToyCost()
    seconds = cost.seconds(100, 5050, 0, 0, 1) + sum(cost.seconds(0, 0, 1, 100 + j) for j in range(1, 10))
    served = simulate(poisson(*draw_lengths(Fixed(100), Fixed(10), 20_000), load / seconds), cost, ONE)
    wait = (served.begun_s - served.arrival_s).mean()
    assert wait == pytest.approx(load * seconds / (2 * (1 - load)), rel=0.08)
    assert served.latency_s.mean() == pytest.approx(wait + seconds)
    assert served.utilisation == pytest.approx(load, rel=0.03)


def test_unequal_requests_one_at_a_time_wait_as_in_an_m_g_1_queue() -> None:
    """Pollaczek-Khinchine: the mean wait is rate x E[S^2] / (2 (1 - load))."""
    inputs, outputs = draw_lengths(LogNormal(100, 0.6), LogNormal(30, 0.6), 20_000)
    alone = simulate(closed_loop(inputs, outputs, 1), ToyCost(), ONE)
    service = alone.last_token_s - alone.begun_s
    rate = 0.7 / service.mean()
    served = simulate(poisson(inputs, outputs, rate), ToyCost(), ONE)
    wait = (served.begun_s - served.arrival_s).mean()
    assert wait == pytest.approx(rate * (service**2).mean() / (2 * 0.3), rel=0.1)


@pytest.mark.parametrize("stages", [1, 3])
def test_littles_law_holds_of_what_decodes(stages: int) -> None:
    """Sequences that decode, summed over time, are the requests' times between their first and their last token."""
    steps: list[Step] = []
    traffic = requests(300, 4.0)
    served = simulate(traffic, ToyCost(stages), LIMITS, trace=steps)
    moments = np.unique(np.concatenate([served.first_token_s, served.last_token_s]))
    middle = (moments[1:] + moments[:-1]) / 2
    inside = np.searchsorted(np.sort(served.first_token_s), middle)
    inside = inside - np.searchsorted(np.sort(served.last_token_s), middle)
    summed = float((inside * np.diff(moments)).sum())
    assert summed == pytest.approx(float((served.last_token_s - served.first_token_s).sum()))
    if stages == 1:  # then all of them are in every step
        assert sum(len(step.decoding) * (step.end - step.start) for step in steps) == pytest.approx(summed)
    assert served.totals.decoded == int((served.output_tokens - 1).sum())
    assert served.totals.prompt_tokens == int(served.input_tokens.sum())


def test_a_request_alone_takes_its_steps() -> None:
    cost = ToyCost()
    traffic = poisson(np.array([600]), np.array([3]), 1.0)
    served = simulate(traffic, cost, LIMITS)
    prompt = cost.seconds(256, 256 * 257 / 2, 0, 0) + cost.seconds(256, 256 * 256 + 256 * 257 / 2, 0, 0)
    prompt += cost.seconds(88, 88 * 512 + 88 * 89 / 2, 0, 0, 1)
    assert served.ttft_s == pytest.approx([prompt])
    assert served.tpot_s == pytest.approx([(cost.seconds(0, 0, 1, 601) + cost.seconds(0, 0, 1, 602)) / 2])
    assert served.queueing_share == 0


def test_pieces_of_a_prompt_follow_each_other_through_a_pipeline() -> None:
    cost, flat = ToyCost(4), ToyCost(1)
    served = simulate(poisson(np.array([1024]), np.array([1]), 1.0), cost, LIMITS)
    whole = [flat.seconds(256, 256 * 256 * piece + 256 * 257 / 2, 0, 0, piece == 3) for piece in range(4)]
    assert served.ttft_s == pytest.approx([whole[-1] + sum(whole[:-1]) / 4], rel=1e-3)
    assert np.isnan(served.tpot_s).all()
    assert served.within(1.0, 1e-9).all()


def test_a_closed_loop_holds_as_many_as_it_may() -> None:
    inputs, outputs = draw_lengths(LogNormal(100, 0.6), LogNormal(30, 0.6), 200)
    served = simulate(closed_loop(inputs, outputs, 7), ToyCost(), LIMITS, replicas=2)
    inside = [
        int(((served.arrival_s <= now) & (served.last_token_s > now)).sum()) for now in served.arrival_s[7:] + 1e-9
    ]
    assert max(inside) == 7
    assert min(inside[:-7]) == 7


def test_replicas_share_the_load_and_none_is_idle() -> None:
    served = simulate(requests(400, 40.0), ToyCost(), LIMITS, replicas=4)
    prompts = [totals.prompts for totals in served.replicas]
    assert sum(prompts) == 400
    assert max(prompts) < 1.3 * min(prompts)
    assert served.latency_s.mean() < simulate(requests(400, 40.0), ToyCost(), LIMITS).latency_s.mean()


def test_a_burst_goes_to_the_replica_with_the_fewest_tokens_outstanding() -> None:
    traffic = Traffic(np.array([0.0, 0.001, 0.002]), np.array([4000, 100, 100]), np.array([2, 2, 2]))
    served = simulate(traffic, ToyCost(), LIMITS, replicas=2)
    assert sorted(totals.prompts for totals in served.replicas) == [1, 2]
    assert served.ttft_s[1] < served.ttft_s[0] / 4
    assert served.ttft_s[2] < served.ttft_s[0] / 4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), rate=st.floats(0.5, 30), more=st.floats(1.2, 4), stages=st.integers(1, 3))
def test_more_requests_never_lower_the_latency(seed: int, rate: float, more: float, stages: int) -> None:
    calm = simulate(requests(80, rate, seed), ToyCost(stages), LIMITS).latency_s.mean()
    busy = simulate(requests(80, rate * more, seed), ToyCost(stages), LIMITS).latency_s.mean()
    assert busy >= calm * 0.99  # which of two steps an arrival just misses is chance


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    rate=st.floats(0.5, 30),
    term=st.sampled_from(["fixed", "token", "pair", "held"]),
    less=st.floats(0.1, 0.9),
    stages=st.integers(1, 3),
)
def test_a_faster_step_never_makes_requests_slower(seed: int, rate: float, term: str, less: float, stages: int) -> None:
    traffic, cost = requests(80, rate, seed), ToyCost(stages)
    faster = replace(cost, **{term: getattr(cost, term) * less})
    before, after = (simulate(traffic, one, LIMITS).latency_s.mean() for one in (cost, faster))
    assert after <= before * 1.01


@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_twice_as_fast_with_all_there_at_once_is_half_the_time(seed: int, factor: float) -> None:
    traffic = at_once(*draw_lengths(LogNormal(100, 0.6), LogNormal(30, 0.6), 50, seed))
    cost = ToyCost()
    scaled = ToyCost(1, *(getattr(cost, term) * factor for term in ("fixed", "token", "pair", "held", "end")))
    before, after = simulate(traffic, cost, LIMITS), simulate(traffic, scaled, LIMITS)
    assert after.latency_s == pytest.approx(before.latency_s * factor)


def test_more_cache_means_fewer_preemptions() -> None:
    traffic = at_once(*draw_lengths(Fixed(64), Fixed(64), 40))
    found = [
        simulate(traffic, ToyCost(), replace(LIMITS, kv_tokens=tokens)).totals.preemptions
        for tokens in (256, 512, 1024, 4096)
    ]
    assert found[0] > 0
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_a_queue_that_grows_is_told_from_one_that_does_not() -> None:
    cost, tokens = ToyCost(), draw_lengths(LogNormal(100, 0.6), LogNormal(30, 0.6), 600)
    most = simulate(at_once(*tokens), cost, LIMITS).requests_per_s
    assert not simulate(poisson(*tokens, 0.6 * most), cost, LIMITS).backlog_grows
    assert simulate(poisson(*tokens, 2.0 * most), cost, LIMITS).backlog_grows


def test_goodput_counts_what_met_both_targets() -> None:
    served = simulate(requests(200, 20.0), ToyCost(), LIMITS)
    ttft, tpot = (float(np.median(values[~np.isnan(values)])) for values in (served.ttft_s, served.tpot_s))
    both = (served.ttft_s <= ttft) & (served.tpot_s <= tpot)
    assert served.goodput(ttft, tpot) == pytest.approx(both.sum() / served.seconds)
    assert served.goodput(None, None) == pytest.approx(served.requests_per_s)
    assert served.percentiles()["ttft_s"]["p50"] == pytest.approx(ttft)


def test_a_replay_gives_every_request_back() -> None:
    traffic = requests(50, 5.0)
    served = replay(traffic, ToyCost(), LIMITS)
    assert (served.input_tokens == traffic.input_tokens).all()
    assert (served.last_token_s > served.first_token_s).sum() == (traffic.output_tokens > 1).sum()


def test_the_clocks_lines_are_the_steps_cost() -> None:
    cost = ToyCost(2)
    clock = Clock(cost)
    for sequences, context in [(1, 1), (3, 9), (7, 7000), (64, 64 * 1023)]:
        seconds, interval = clock.decode(sequences, context)
        assert seconds.at(context) == pytest.approx(cost.seconds(0, 0, sequences, context), rel=1e-12)
        assert interval.at(context) == pytest.approx(cost.interval_seconds(0, 0, sequences, context), rel=1e-12)
        assert context <= seconds.up_to
        steps = [seconds.at(context + sequences * step) for step in range(20)]
        assert seconds.elapsed(20, sequences, context) == pytest.approx(sum(steps))
        for reached in (1, 7, 20):
            until = sum(steps[:reached]) - 1e-6
            assert seconds.steps_until(until, 20, sequences, context) == reached
        assert seconds.steps_until(1e9, 20, sequences, context) == 20
        assert seconds.steps_until(-1.0, 20, sequences, context) == 1


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(BadInput, match="needs more than the 160"):
        simulate(at_once(np.array([100]), np.array([61])), ToyCost(), replace(LIMITS, kv_tokens=170))


def test_a_step_waits_for_its_longest_sequence_by_what_is_uneven() -> None:
    """A hand's example: held 20 and 5 tokens, the second one gone after 2 steps."""
    group = Group(block_tokens=16)
    group.add(1, 20, 5)
    group.add(2, 5, 2)
    assert (group.context, group.context_to_read(0.0), group.context_to_read(0.2)) == (25, 25, 28)  # 25 + 0.2 (40 - 25)
    group.step(2)
    assert group.context_to_read(0.2) == 29 + 3
    assert [member for member, _ in group.pop_ended()] == [2]
    assert group.context_to_read(0.2) == group.context == 22
    group.add(3, 30, 9)
    assert group.context_to_read(1.0) == 60


def test_equal_lengths_are_as_fast_however_much_the_longest_counts() -> None:
    equal, unlike = (at_once(np.array(lengths), np.array([20, 20])) for lengths in ([100, 100], [40, 160]))
    even = [simulate(traffic, ToyCost(), LIMITS).seconds for traffic in (equal, unlike)]
    uneven = [simulate(traffic, ToyCost(uneven=0.5), LIMITS).seconds for traffic in (equal, unlike)]
    assert uneven[0] == even[0]
    longer = 0.5 * (2 * 160 - 200) * 19  # tokens, over the steps in which both decode
    assert uneven[1] - even[1] == pytest.approx(ToyCost.held * longer, rel=1e-6)
