"""Estimates of whole deployments, and static batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.shapes import llama
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.step import step_cost
from triaxial.plan.serving.engine import FASTER_TRANSFORMER, TENSORRT_LLM, TENSORRT_LLM_1_0, VLLM
from triaxial.plan.serving.estimate import ServingEstimate, estimate_serving, limits_of, traffic_of
from triaxial.plan.serving.search.closed_form import static_batch
from triaxial.plan.serving.workload import Serving

H100 = load_cluster("8xH100-SXM")


ONE_GPU = Layout()


def estimate(layout: Layout = ONE_GPU, **work: float) -> ServingEstimate:
    asked = Serving(**{"input_len": 512, "output_len": 64, **work})  # type: ignore[arg-type]
    return estimate_serving(llama(), H100, asked, layout)


class TestEstimate:
    @given(st.floats(0.5, 200), st.floats(1, 4))
    @settings(max_examples=10, deadline=None)
    def test_more_requests_never_lower_latency(self, rate: float, times: float) -> None:
        few, many = (estimate(rate=r) for r in (rate, rate * times))
        latency = [e.ttft_s + 63 * e.tpot_s for e in (few, many)]
        assert latency[1] >= latency[0] * (1 - 1e-3)

    @given(st.integers(1, 40), st.integers(1, 40))
    @settings(max_examples=10, deadline=None)
    def test_more_clients_give_more_tokens_later(self, few: int, more: int) -> None:
        first, second = (estimate(concurrency=n) for n in (few, few + more))
        assert second.tpot_s >= first.tpot_s * (1 - 1e-3)
        assert second.output_tokens_per_s >= first.output_tokens_per_s * 0.98

    def test_one_client_waits_for_its_own_steps_only(self) -> None:
        alone = estimate(concurrency=1)
        cost = step_cost(llama(), H100, Layout(), Serving(input_len=512, output_len=64))
        prompt = float(cost.seconds(512, 512 * 513 / 2, 0, 0, 1))
        assert alone.ttft_s == pytest.approx(prompt + cost.host.request_s)
        assert alone.tpot_s == pytest.approx(sum(alone.decode_s.values()), rel=0.01)
        assert sum(alone.prefill_s.values()) == pytest.approx(prompt)

    def test_replicas_share_the_rate(self) -> None:
        one, two = estimate(rate=40.0), estimate(Layout(dp=2), rate=80.0)
        assert two.output_tokens_per_s == pytest.approx(2 * one.output_tokens_per_s, rel=0.1)
        assert two.tpot_s == pytest.approx(one.tpot_s, rel=0.1)
        assert two.to_dict()["tokens_per_s_per_gpu"] == two.output_tokens_per_s / 2

    def test_what_does_not_fit_says_so(self) -> None:
        work = Serving(input_len=1024, output_len=64, concurrency=4)
        found = estimate_serving(load_model_spec("llama-3.1-405b"), H100, work, Layout(tp=8))
        assert not found.fits
        assert found.max_batch == 0
        assert found.memory_gib["peak"] > 79.6
        assert found.tpot_s > 812e9 / 8 / 3352e9  # as fast as its weights are read, had they room

    def test_memory_is_of_the_sequences_that_run(self) -> None:
        found = estimate(concurrency=8)
        assert found.memory_gib["kv_cache"] == pytest.approx(found.decode_batch * 576 * 2 * 8 * 64 * 2 * 8 / 2**30)
        parts = [gib for part, gib in found.memory_gib.items() if part != "peak"]
        assert found.memory_gib["peak"] == pytest.approx(sum(parts))


class TestLimits:
    def test_traffic_is_a_loop_of_clients_or_has_a_rate(self) -> None:
        loop = traffic_of(Serving(input_len=100, output_len=50, concurrency=7))
        assert (len(loop), loop.concurrency) == (70, 7)
        assert loop.output_tokens.min() >= 45
        assert loop.output_tokens.max() <= 55
        arriving = traffic_of(Serving(input_len=100, output_len=50, rate=20.0))
        assert arriving.concurrency is None
        assert arriving.rate == pytest.approx(20.0, rel=0.1)

    def test_engines_differ_in_slots_and_room_for_prompts(self) -> None:
        work = Serving(input_len=100, output_len=50, concurrency=32, chunk_tokens=2048)
        chunked, whole, spare = (
            limits_of(work, step_cost(llama(), H100, Layout(), work, engine))
            for engine in (VLLM, TENSORRT_LLM, TENSORRT_LLM_1_0)
        )
        assert (chunked.max_batch, chunked.chunk_tokens) == (32, 2048)
        assert (whole.max_batch, whole.chunk_tokens) == (32, 2048 + 32)
        assert spare.max_batch == 31

    def test_an_engine_that_reserves_outputs_runs_no_more_than_fit(self) -> None:
        model = load_model_spec("llama-3.1-70b")
        work = Serving(input_len=8000, output_len=1000, concurrency=200, precision="fp8")
        cost = step_cost(model, H100, Layout(tp=2), work, TENSORRT_LLM)
        held = cost.memory.max_sequences(9000)
        assert held < 200
        assert limits_of(work, cost).max_batch == held


class TestStaticBatch:
    def test_is_a_prompt_and_its_steps(self) -> None:
        cost = step_cost(llama(), H100, Layout(tp=2), Serving(input_len=1, output_len=1), FASTER_TRANSFORMER)
        found = static_batch(cost, 8, 100, 21)
        assert found.ttft_s == float(cost.seconds(800, 8 * 100 * 101 / 2, 0, 0, 8))
        assert found.decode_s == pytest.approx(
            sum(float(cost.seconds(0, 0, 8, 8 * (100 + n))) for n in range(1, 21)), rel=1e-3
        )
        assert found.total_s == found.ttft_s + found.decode_s

    def test_a_pipeline_takes_its_parts_one_behind_the_other(self) -> None:
        cost = step_cost(llama(), H100, Layout(pp=4), Serving(input_len=1, output_len=1), VLLM)
        part = (0.0, 0.0, 4.0, 4.0 * (100 + 10))
        expected = 19 * (float(cost.seconds(*part)) + 3 * float(cost.interval_seconds(*part)))
        assert static_batch(cost, 16, 100, 20).decode_s == pytest.approx(expected)

    def test_one_token_needs_no_decoding(self) -> None:
        cost = step_cost(llama(), H100, Layout(), Serving(input_len=1, output_len=1))
        assert static_batch(cost, 4, 10, 1).decode_s == 0
