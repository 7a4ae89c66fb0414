"""The search finds what trying everything finds, and what people who serve models know comes out of it by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from triaxial import NoAnswer
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.serving.demand import Demand, demand_for, serving_work
from triaxial.plan.serving.engine import VLLM
from triaxial.plan.serving.search.candidates import CHUNK_TOKENS, Candidate, candidates, screen
from triaxial.plan.serving.search.closed_form import alone, steady
from triaxial.plan.serving.search.option import RATE_PRECISION, Objective, Option, carried_rate, highest, operate
from triaxial.plan.serving.search.search import Found, search
from triaxial.plan.serving.traffic import at_once


def found(
    model: str, cluster: str, demand: Demand, objective: Objective, top: int = 3, precision: str = "bf16"
) -> Found:
    work = serving_work(demand, precision, "bf16")
    return search(load_model_spec(model), load_cluster(cluster), work, demand, objective, top=top)


def best(model: str, cluster: str, demand: Demand, objective: Objective) -> Option:
    return found(model, cluster, demand, objective, top=1).best[0]


def chat(requests: int = 300, **asked: float) -> Demand:
    return demand_for(input_len="1024", output_len="256", requests=requests, **asked)  # type: ignore[arg-type]


def every(model: str, cluster: str, demand: Demand) -> list[Candidate]:
    return list(candidates(load_model_spec(model), load_cluster(cluster), serving_work(demand, "bf16", "bf16"), VLLM))


# What people know


@pytest.mark.parametrize(
    ("model", "cluster", "tp"), [("llama-3.1-8b", "1x8xH100-SXM", 8), ("llama-3.1-70b", "1x8xA100", 8)]
)
def test_tensor_parallelism_over_the_whole_node_answers_soonest(model: str, cluster: str, tp: int) -> None:
    winner = best(model, cluster, chat(), "latency")
    assert (winner.layout.tp, winner.layout.pp) == (tp, 1)


def test_over_pcie_replicas_of_one_gpu_give_most() -> None:
    winner = best("llama-3.1-8b", "1x8xL40S", chat(), "throughput")
    assert (winner.layout.tp, winner.layout.pp, winner.layout.dp) == (1, 1, 8)


def test_a_model_too_large_for_a_node_is_cut_by_tp_inside_and_pp_across() -> None:
    winner = best("llama-3.1-405b", "2x8xH100-SXM", chat(200, ttft_s=3.0, tpot_s=0.15), "throughput")
    assert winner.layout.tp in (4, 8)
    assert winner.layout.tp * winner.layout.pp == 16


def test_slower_links_want_less_tensor_parallelism() -> None:
    demand, model = chat(), load_model_spec("llama-3.1-8b")
    work = serving_work(demand, "bf16", "bf16")
    fast, slow = (
        search(model, load_cluster("1x8xH100-SXM", intra=link), work, demand, "latency", top=1).best[0]
        for link in ("nvlink4", "pcie4")
    )
    assert slow.layout.tp < fast.layout.tp
    assert slow.latency_s > fast.latency_s


def test_more_requests_need_more_replicas_and_no_fewer_gpus() -> None:
    plans = [
        best("llama-3.1-8b", "1x8xH100-SXM", chat(rate=rate, ttft_s=0.5, tpot_s=0.03), "gpus") for rate in (4, 16, 48)
    ]
    gpus = [plan.gpus for plan in plans]
    assert gpus == sorted(gpus)
    assert gpus[0] == 1 < gpus[-1]
    assert plans[-1].replicas > 1


def test_tighter_targets_never_give_more() -> None:
    loose, tight = (
        best("llama-3.1-8b", "1x4xH100-SXM", chat(ttft_s=1.0, tpot_s=tpot), "throughput") for tpot in (0.05, 0.015)
    )
    assert tight.tokens_per_s_per_gpu < loose.tokens_per_s_per_gpu
    assert tight.served.at_percentile(90)[1] <= 0.015


# Against trying everything


def test_the_highest_throughput_is_what_trying_everything_finds() -> None:
    demand = chat(200)
    load = at_once(demand.traffic.input_tokens, demand.traffic.output_tokens)
    most = 0.0
    for candidate in every("llama-3.1-8b", "1x4xL40S", demand):
        for chunk in (512, 1024, 4096):
            for batch in (128, 512):
                limits = candidate.limits(min(batch, chunk), chunk)
                served = candidate.serve(load, limits)
                most = max(most, served.output_tokens_per_s / candidate.replica_gpus)
    assert best("llama-3.1-8b", "1x4xL40S", demand, "throughput").tokens_per_s_per_gpu >= 0.97 * most


def test_one_replica_fewer_misses_the_targets() -> None:
    demand = chat(rate=80.0, ttft_s=0.5, tpot_s=0.03)
    winner = best("llama-3.1-8b", "1x8xH100-SXM", demand, "gpus")
    assert winner.replicas > 1
    assert demand.met_by(winner.served)
    fewer = winner.replicas - 1
    load = demand.arriving(80.0, 80.0 * winner.latency_s)
    assert not demand.met_by(winner.candidate.serve(load, winner.limits, fewer))
    assert carried_rate(winner) >= 80.0 / RATE_PRECISION


def test_what_is_left_out_for_being_slow_alone_is_slow_under_any_load() -> None:
    demand = chat(60, tpot_s=0.012, ttft_s=0.2)
    left_out = 0
    for candidate in every("llama-3.1-8b", "1x4xL40S", demand):
        ttft, tpot = alone(candidate.cost, CHUNK_TOKENS, demand.long_input, demand.mean_output)
        if demand.met(ttft, tpot):
            continue
        left_out += 1
        for chunk in (256, 2048):
            served = candidate.serve(demand.traffic.at_rate(0.05), candidate.limits(16, chunk))
            assert not demand.met_by(served)
    assert left_out > 0


@pytest.mark.parametrize("load", [0.1, 0.5])
def test_the_closed_form_is_near_the_simulation(load: float) -> None:
    demand = chat(600)
    for candidate in every("llama-3.1-8b", "1x4xH100-SXM", demand):
        one = screen(candidate, demand, "throughput")
        rate = load * float(one.table.rate.max())
        row = one.table.at_rate(rate)
        assert row is not None
        served = candidate.serve(demand.traffic.at_rate(rate), one.limits)
        assert served.tpot_s.mean() == pytest.approx(one.table.tpot_s[row], rel=0.2)
        assert served.ttft_s.mean() == pytest.approx(one.table.ttft_s[row], rel=0.35)


def test_a_score_to_beat_ends_the_search_of_a_candidate() -> None:
    demand = chat(200, ttft_s=1.0, tpot_s=0.05)
    one = screen(every("llama-3.1-8b", "1x1xH100-SXM", demand)[0], demand, "throughput")
    option = operate(one, demand, "throughput")
    assert option is not None
    score = option.score("throughput")[0]
    assert operate(one, demand, "throughput", to_beat=score / 1.2) is None
    again = operate(one, demand, "throughput", to_beat=score * 1.2)
    assert again is not None
    assert again.rate == pytest.approx(option.rate, rel=0.03)


@pytest.mark.parametrize("guess", [3.0, 10.0, 17.0, 40.0])
def test_the_highest_rate_is_found_from_any_guess(guess: float) -> None:
    assert highest(lambda rate: rate <= 14.2, guess) == pytest.approx(14.2, rel=RATE_PRECISION - 1)
    assert highest(lambda rate: False, guess) == 0


def test_options_are_ranked_and_lie_within_the_cluster() -> None:
    result = found("llama-3.1-8b", "1x4xH100-SXM", chat(100, ttft_s=1.0, tpot_s=0.03), "throughput", top=3)
    scores = [option.score("throughput") for option in result.best]
    assert scores == sorted(scores)
    assert len({(option.layout.tp, option.layout.pp) for option in result.best}) == len(result.best)
    for option in result.best:
        assert option.gpus <= 4
        assert option.demand.met_by(option.served)
        assert option.requests_per_s == pytest.approx((option.rate or 0) * option.replicas)


def test_fewer_bits_serve_more() -> None:
    half, full = (
        found("llama-3.1-8b", "1x1xH100-SXM", chat(200, tpot_s=0.02), "throughput", 1, precision).best[0]
        for precision in ("fp8", "bf16")
    )
    assert half.tokens_per_s_per_gpu > 1.2 * full.tokens_per_s_per_gpu


# Where the answer is no


def test_a_model_that_does_not_fit_names_the_smallest_cluster_that_does() -> None:
    with pytest.raises(NoAnswer, match="smallest cluster that would do is 2x8xH100-SXM"):
        found("llama-3.1-405b", "1x8xH100-SXM", chat(), "latency")


def test_targets_out_of_reach_name_the_best_there_is() -> None:
    demand = chat(ttft_s=0.5, tpot_s=0.001)
    with pytest.raises(NoAnswer, match=r"the best TPOT 0\.\d+ s \(tp=\d+,pp=1") as caught:
        found("llama-3.1-8b", "1x8xH100-SXM", demand, "throughput")
    nearest = float(str(caught.value).split("the best TPOT ")[1].split(" s")[0])
    reached = found("llama-3.1-8b", "1x8xH100-SXM", replace(demand, tpot_s=nearest * 1.1), "throughput", top=1)
    assert reached.best[0].served.at_percentile(90)[1] <= nearest * 1.1


def test_too_many_requests_name_the_gpus_that_would_do() -> None:
    with pytest.raises(NoAnswer, match=r"the fewest GPUs that would do are about (4|8)$"):
        found("llama-3.1-8b", "1x2xH100-SXM", chat(rate=60.0, ttft_s=1.0, tpot_s=0.05), "gpus")


def test_a_steady_state_knows_its_own_limits() -> None:
    demand = chat()
    candidate = every("llama-3.1-8b", "1x1xL40S", demand)[0]
    table = steady(candidate.cost, candidate.limits(64, 512), 1024, 256)
    assert (table.rate[1:] > table.rate[:-1]).all()
    assert (table.tpot_s[1:] >= table.tpot_s[:-1]).all()
    assert table.at_rate(2 * float(table.rate.max())) is None
    assert table.fastest(None, 1e-6) == (0.0, 0.0)
    assert table.fastest(None, None)[0] == table.rate.max()
