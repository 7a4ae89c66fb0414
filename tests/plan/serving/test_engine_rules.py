"""The simulator puts together the very steps that the engine's scheduler does, and at the same times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.serving.stepping import ToyCost, serve_stepwise
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.served import Step
from triaxial.plan.serving.simulation.simulate import simulate
from triaxial.plan.serving.traffic import LogNormal, Traffic, draw_lengths, poisson

ROOMY = Limits(max_batch=8, chunk_tokens=64, kv_tokens=4096, block_tokens=4)
NARROW = replace(ROOMY, kv_tokens=160)
CROWDED = replace(ROOMY, chunk_tokens=3)
WINDOWED = replace(NARROW, window=13)


def traffic(count: int, rate: float, seed: int = 0) -> Traffic:
    inputs, outputs = draw_lengths(LogNormal(40, 0.8), LogNormal(20, 0.8), count, seed)
    return poisson(np.minimum(inputs, 100), np.minimum(outputs, 40), rate, seed)


def unrolled(steps: list[Step]) -> list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    return [(step.decoding, step.prompts) for step in steps for _ in range(step.steps)]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("rate", [0.5, 20.0, 100.0])
@pytest.mark.parametrize(
    "limits", [ROOMY, NARROW, CROWDED, WINDOWED], ids=["roomy", "narrow", "fewer tokens than sequences", "windowed"]
)
def test_every_step_holds_what_the_engines_would(stages: int, rate: float, limits: Limits) -> None:
    requests, cost = traffic(40, rate), ToyCost(stages)
    stepped = serve_stepwise(requests, cost, limits)
    steps: list[Step] = []
    served = simulate(requests, cost, limits, trace=steps)
    assert unrolled(steps) == stepped.steps
    assert served.totals.preemptions == stepped.preemptions
    assert served.first_token_s == pytest.approx(stepped.first_token, rel=1e-9)
    assert served.last_token_s == pytest.approx(stepped.last_token, rel=1e-9)


def test_the_narrow_cache_does_preempt() -> None:
    assert serve_stepwise(traffic(40, 100.0), ToyCost(), NARROW).preemptions > 0
    assert serve_stepwise(traffic(40, 100.0), ToyCost(3), NARROW).preemptions > 0


def test_a_window_spares_preemptions() -> None:
    narrow, windowed = (serve_stepwise(traffic(40, 100.0), ToyCost(), limits) for limits in (NARROW, WINDOWED))
    assert windowed.preemptions < narrow.preemptions


@settings(max_examples=150, deadline=None)
@given(
    stages=st.integers(1, 4),
    max_batch=st.integers(1, 9),
    chunk_tokens=st.integers(1, 50),
    kv_tokens=st.integers(150, 500),
    block_tokens=st.integers(1, 9),
    window=st.none() | st.integers(1, 60),
    rate=st.floats(0.3, 200),
    seed=st.integers(0, 10_000),
)
def test_so_it_is_for_any_sizes(
    stages: int,
    max_batch: int,
    chunk_tokens: int,
    kv_tokens: int,
    block_tokens: int,
    window: int | None,
    rate: float,
    seed: int,
) -> None:
    limits = Limits(
        max_batch=max_batch,
        chunk_tokens=chunk_tokens,
        kv_tokens=kv_tokens,
        block_tokens=block_tokens,
        window=window,
    )
    requests, cost = traffic(12, rate, seed), ToyCost(stages)
    stepped = serve_stepwise(requests, cost, limits)
    steps: list[Step] = []
    served = simulate(requests, cost, limits, trace=steps)
    assert unrolled(steps) == stepped.steps
    assert served.last_token_s == pytest.approx(stepped.last_token, rel=1e-9)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("rate", [0.5, 5.0, 30.0])
def test_decode_steps_sent_in_turn_are_those_sent_one_by_one(stages: int, rate: float) -> None:
    requests, cost = traffic(60, rate), ToyCost(stages)
    one_by_one = simulate(requests, cost, ROOMY, trace=[])
    in_turn = simulate(requests, cost, ROOMY)
    assert in_turn.first_token_s == pytest.approx(one_by_one.first_token_s, rel=1e-12)
    assert in_turn.last_token_s == pytest.approx(one_by_one.last_token_s, rel=1e-12)
    for ours, theirs in zip(in_turn.replicas, one_by_one.replicas):
        assert vars(ours) == pytest.approx(vars(theirs))
