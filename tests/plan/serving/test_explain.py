"""What a plan says of its winner is what its figures say."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from triaxial import BadInput
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.search.what_if import scaled
from triaxial.plan.serving.demand import Demand, Objective, demand_for, serving_work, with_price
from triaxial.plan.serving.search.explain import TERM_WORDS, explain, request_seconds
from triaxial.plan.serving.search.flips import PRECISION, _find
from triaxial.plan.serving.search.frontier import frontier
from triaxial.plan.serving.search.plan import ServingPlan, plan_serving
from triaxial.plan.serving.search.search import Found, search
from triaxial.report.frontier import frontier_svg

NODE = load_cluster("1x4xH100-SXM")
MODEL = load_model_spec("llama-3.1-8b")


def chat(**asked: float) -> Demand:
    return demand_for(input_len="1024", output_len="256", requests=200, **asked)  # type: ignore[arg-type]


def plan(demand: Demand, objective: Objective, cluster: str = "1x4xH100-SXM", flips: bool = False) -> ServingPlan:
    work = serving_work(demand, "bf16", "bf16")
    return plan_serving(MODEL, with_price(load_cluster(cluster), 2.5), work, demand, objective, flips=flips)


@pytest.fixture(scope="module")
def quick() -> Found:
    demand = chat()
    return search(MODEL, NODE, serving_work(demand, "bf16", "bf16"), demand, "latency")


def test_a_requests_seconds_add_up_to_its_latency(quick: Found) -> None:
    for option in quick.best:
        parts = request_seconds(option.candidate, option.served)
        assert set(parts) <= set(TERM_WORDS)
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(option.latency_s + 0.0, rel=0.02)


def test_alone_what_binds_is_reading_weights_and_under_load_others_count(quick: Found) -> None:
    demand = chat()
    alone = search(MODEL, load_cluster("1x1xH100-SXM"), serving_work(demand, "bf16", "bf16"), demand, "latency")
    why = explain(alone, "latency", flips=False)
    assert why.binds == "weights"
    assert "What binds is reading weights" in why.sentences[1]
    single = alone.best[0]
    busy = single.candidate.serve(demand.traffic.at_rate(20.0), single.candidate.limits(256, 512))
    crowded, calm = (request_seconds(single.candidate, served) for served in (busy, single.served))
    assert crowded["others"] / sum(crowded.values()) > 0.15 > calm["others"] / sum(calm.values())


def test_rivals_lose_by_what_their_own_simulation_says(quick: Found) -> None:
    why = explain(quick, "latency", flips=False)
    winner, second = quick.best[:2]
    loss = second.latency_s / winner.latency_s - 1
    assert loss >= 0
    named = next(sentence for sentence in why.sentences if f"tp={second.layout.tp}, pp={second.layout.pp}:" in sentence)
    assert f"a request takes {loss:+.1%}" in named


def test_the_splits_next_to_the_winner_are_all_accounted_for() -> None:
    demand = demand_for(input_len="1024", output_len="256", requests=100, tpot_s=0.05)
    model, node = load_model_spec("llama-3.1-70b"), load_cluster("1x2xH100-SXM")
    found = search(model, node, serving_work(demand, "bf16", "bf16"), demand, "throughput")
    sentences = " ".join(explain(found, "throughput", flips=False).sentences)
    tp, pp = found.best[0].layout.tp, found.best[0].layout.pp
    sizes = {(one.layout.tp, one.layout.pp) for one in found.considered}
    for near in {(2 * tp, pp), (tp // 2, pp), (tp, 2 * pp), (tp, pp // 2)} & sizes:
        assert f"tp={near[0]}, pp={near[1]}:" in sentences
    assert "does not hold the weights" in sentences


def test_a_price_makes_money_of_gpu_hours() -> None:
    made = plan(chat(rate=10.0, tpot_s=0.03), "cost")
    first = made.plans[0].to_dict()
    assert first["gpu_hours_per_million_tokens"] == pytest.approx(
        first["gpus"] / 3600 / first["output_tokens_per_s"] * 1e6
    )
    assert first["cost_per_million_tokens"] == pytest.approx(2.5 * first["gpu_hours_per_million_tokens"])
    assert f"{first['cost_per_million_tokens']:.3g} in money" in " ".join(made.why.sentences)
    assert any("carry up to" in sentence for sentence in made.why.sentences)


def test_the_objective_cost_needs_a_price() -> None:
    demand = chat()
    with pytest.raises(BadInput, match="--price"):
        plan_serving(MODEL, NODE, serving_work(demand, "bf16", "bf16"), demand, "cost")
    with pytest.raises(BadInput, match="--price must be more than zero"):
        with_price(NODE, -1.0)


@pytest.mark.parametrize(("at", "upward"), [(1.7, True), (6.1, True), (0.62, False), (0.14, False)])
def test_bisection_finds_where_another_wins(quick: Found, at: float, upward: bool) -> None:
    ours, other = quick.best[0].candidate, quick.best[1].candidate
    flip = _find(lambda factor: other if (factor > at) == upward else ours, ours, "rate", 10.0, "1/s", upward)
    assert flip.at is not None
    assert flip.at / 10 == pytest.approx(at, rel=PRECISION - 1)
    assert f"tp={other.layout.tp}, pp={other.layout.pp} wins" in flip.sentence()
    steady = _find(lambda factor: ours, ours, "rate", 10.0, "1/s", upward)
    assert steady.at is None
    assert "no other split wins" in steady.sentence()
    none = _find(lambda factor: None if factor != 1 else ours, ours, "rate", 10.0, "1/s", upward)
    assert "no split does what is asked" in none.sentence()


def test_a_flip_of_the_link_is_confirmed_by_a_search_beyond_it(quick: Found) -> None:
    why = explain(quick, "latency", flips=True)
    flips = {(flip.what, flip.upward): flip for flip in why.flips}
    assert {"link inside a node", "output length", "input length"} == {what for what, _ in flips}
    slower = flips["link inside a node", False]
    if slower.at is None:
        factor, same = 0.5**3, True
    else:
        factor, same = slower.at / slower.now / 1.3, False
    demand = quick.best[0].demand
    there = search(
        MODEL, scaled(NODE, "links inside a node", factor), serving_work(demand, "bf16", "bf16"), demand, "latency"
    )
    assert (there.best[0].layout.tp == quick.best[0].layout.tp) is same


def test_the_frontier_only_rises_and_reaches_from_quick_to_cheap() -> None:
    demand = chat()
    found = search(MODEL, NODE, serving_work(demand, "bf16", "bf16"), demand, "throughput")
    points = frontier(found.screened, demand)
    latencies = [point.latency_s for point in points]
    tokens = [point.tokens_per_s_per_gpu for point in points]
    assert len(points) >= 4
    assert latencies == sorted(latencies)
    assert tokens == sorted(tokens)
    assert points[0].layout == "tp=4,pp=1"
    assert points[-1].layout == "tp=1,pp=1"
    assert tokens[-1] > 0.8 * found.best[0].tokens_per_s_per_gpu
    drawn = ElementTree.fromstring(frontier_svg(points))
    circles = [circle for circle in drawn.iter() if circle.tag.endswith("circle") and len(circle)]
    places = np.array([(float(circle.get("cx", "")), -float(circle.get("cy", ""))) for circle in circles])
    assert len(places) == len(points)
    assert (np.diff(places, axis=0) > 0).all()


def test_a_demand_can_be_made_larger_and_longer() -> None:
    demand = chat(rate=4.0)
    assert demand.times(rate=3.0).rate == pytest.approx(12.0)
    assert demand.times(rate=3.0).traffic.rate == pytest.approx(3.0 * (demand.traffic.rate or 0))
    assert demand.times(output=0.5).mean_output == pytest.approx(128)
    assert demand.times(input=2.0).mean_input == pytest.approx(2048)
    assert replace(demand, rate=None).times(rate=2.0).rate is None
