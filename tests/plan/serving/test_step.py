"""The cost of a step: its parts add up, more of anything is never faster, more bandwidth never slower, and its limits
are those of the roofline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.shapes import llama, mixture
from triaxial import BadInput
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.model.spec import LatentAttention, ModelSpec, load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.constants import SERVING, HostTimes
from triaxial.plan.serving.cost.step import StepCost, step_cost
from triaxial.plan.serving.engine import (
    FASTER_TRANSFORMER,
    MEGATRON,
    SGLANG,
    TENSORRT_LLM,
    TENSORRT_LLM_0_5,
    VLLM,
    VLLM_0_6,
    Engine,
)
from triaxial.plan.serving.workload import Serving

H100 = load_cluster("2x8xH100-SXM")
LAYOUTS = (Layout(tp=1), Layout(tp=2), Layout(tp=8), Layout(tp=2, pp=4), Layout(tp=16), Layout(pp=3))
WINDOWED = llama().model_copy(update={"sliding_window": 512, "first_windowed_layer": 3})
LATENT = llama().model_copy(
    update={"latent": LatentAttention(query_rank=None, kv_rank=256, nope_dim=32, rope_dim=16, value_dim=32)}
)
MODELS = (llama(), mixture(), WINDOWED, LATENT)

steps = st.tuples(
    st.integers(0, 20_000), st.integers(0, 10**8), st.integers(0, 600), st.integers(0, 10**6), st.integers(0, 64)
)


def cost(
    model: ModelSpec = MODELS[0],
    cluster: Cluster = H100,
    layout: Layout = LAYOUTS[0],
    engine: Engine = VLLM,
    **work: Any,
) -> StepCost:
    return step_cost(model, cluster, layout, Serving(input_len=512, output_len=128, **work), engine)


def faster_memory(cluster: Cluster, times: float) -> Cluster:
    device = cluster.device
    more = device.memory_bandwidth_bytes_per_s * times
    return cluster.model_copy(update={"device": device.model_copy(update={"memory_bandwidth_bytes_per_s": more})})


def faster_links(cluster: Cluster, times: float, latency_s: float | None = None) -> Cluster:
    update = {} if latency_s is None else {"latency_s": latency_s}
    tiers = [
        tier.model_copy(update={"bandwidth_bytes_per_s": tier.bandwidth_bytes_per_s * times, **update})
        for tier in cluster.tiers
    ]
    return cluster.model_copy(update={"tiers": tuple(tiers)})


class TestSeconds:
    @given(
        st.sampled_from(MODELS), st.sampled_from(LAYOUTS), st.sampled_from((VLLM, MEGATRON, TENSORRT_LLM_0_5)), steps
    )
    @settings(max_examples=60, deadline=None)
    def test_parts_add_up(
        self, model: ModelSpec, layout: Layout, engine: Engine, step: tuple[float, float, float, float, float]
    ) -> None:
        priced = cost(model, layout=layout, engine=engine)
        assert sum(priced.parts(*step).values()) == pytest.approx(priced.seconds(*step))
        assert all(seconds >= 0 for seconds in priced.parts(*step).values())

    @given(st.sampled_from(MODELS), st.sampled_from(LAYOUTS), steps, steps)
    @settings(max_examples=100, deadline=None)
    def test_more_work_is_never_faster(
        self, model: ModelSpec, layout: Layout, step: tuple[int, ...], more: tuple[int, ...]
    ) -> None:
        priced = cost(model, layout=layout)
        larger = tuple(a + b for a, b in zip(step, more))
        assert priced.seconds(*larger) >= priced.seconds(*step) * (1 - 1e-3)  # tables interpolate tiles

    @given(st.sampled_from(MODELS), st.sampled_from(LAYOUTS), steps, st.floats(1, 10), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_more_bandwidth_is_never_slower(
        self, model: ModelSpec, layout: Layout, step: tuple[int, ...], times: float, memory: bool
    ) -> None:
        faster = (faster_memory if memory else faster_links)(H100, times)
        assert cost(model, faster, layout).seconds(*step) <= cost(model, layout=layout).seconds(*step) * (1 + 1e-9)

    def test_arrays_are_priced_like_numbers(self) -> None:
        priced = cost(layout=Layout(tp=2, pp=2))
        batch = np.array([1.0, 17.0, 300.0])
        together = priced.seconds(0.0, 0.0, batch, 700 * batch)
        assert np.allclose(together, [priced.seconds(0, 0, b, 700 * b) for b in batch])

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_a_batch_follows_the_one_before_after_the_slowest_stage(self, layout: Layout) -> None:
        priced, step = cost(layout=layout, engine=VLLM_0_6), (1000, 500_000, 64, 30_000, 2)
        seconds, interval = priced.seconds(*step), priced.interval_seconds(*step)
        if layout.pp == 1:
            assert interval == seconds
        else:
            assert seconds / layout.pp < interval < seconds

    def test_a_layout_that_does_not_cut_the_model_is_refused(self) -> None:
        with pytest.raises(BadInput, match="tp=3 cannot cut"):
            cost(layout=Layout(tp=3))


class TestLimits:
    @pytest.mark.parametrize("tp", [2, 4, 8])
    def test_free_links_leave_the_share_of_the_weights_and_fixed_times(self, tp: int) -> None:
        model = load_model_spec("llama-3.1-8b")
        free = faster_links(H100, 1e9, latency_s=0.0)
        alone = cost(model).parts(0, 0, 1, 0)
        cut = cost(model, free, Layout(tp=tp)).parts(0, 0, 1, 0)
        assert cut["weights"] == pytest.approx(alone["weights"] / tp, rel=1e-6)
        assert cut["launches"] == pytest.approx(alone["launches"], rel=0.4)  # an all-reduce is a kernel too
        start = 1.64 * 3.25e-6  # of NCCL's collectives; those of the engine start with a launch
        assert cut["all_reduce"] < (2 * model.num_layers + 2) * start

    def test_weights_are_read_at_the_memory_rate(self) -> None:
        model = load_model_spec("llama-3.1-8b")
        read = (model.parameters - model.vocab * model.hidden) * 2  # a table look-up reads one row
        rate = 3352e9 * SERVING.stream["hopper"]
        assert cost(model).parts(0, 0, 1, 0)["weights"] == pytest.approx(read / rate, rel=1e-3)

    def test_many_tokens_meet_the_compute_roofline(self) -> None:
        model = load_model_spec("llama-3.1-70b")
        tokens = 1e6
        flop = 2 * (model.matmul_parameters - model.vocab * model.hidden) * tokens
        priced = cost(model).parts(tokens, 0, 0, 0)
        reached = flop / (priced["compute"] + priced["weights"])
        assert 0.90 < reached / (989.4e12 * 0.828 * SERVING.held_rate) < 1.0

    def test_decoding_many_sequences_costs_their_keys_and_values(self) -> None:
        model = load_model_spec("llama-3.1-8b")
        priced = cost(model).parts(0, 0, 256, 10**6)
        assert priced["kv"] == pytest.approx(10**6 * 131_072 / (3352e9 * SERVING.stream["hopper"] * SERVING.kv_gain))

    def test_kv_heads_are_cut_no_further_than_there_are(self) -> None:
        model = load_model_spec("llama-3.1-8b")
        at = [cost(model, layout=Layout(tp=tp)).parts(0, 0, 64, 64_000)["kv"] for tp in (1, 8, 16)]
        assert at[1] == pytest.approx(at[0] / 8)
        assert at[2] == at[1]

    def test_a_window_bounds_what_its_layers_read(self) -> None:
        short, long, longer = (cost(WINDOWED).parts(0, 0, 4, 4 * n)["kv"] for n in (512, 1024, 2048))
        # three of eight layers see everything
        assert (longer - long) / (1024 / 512) == pytest.approx(long - short)
        assert (long - short) / short == pytest.approx(3 / 8)

    def test_one_token_reads_the_experts_that_it_visits(self) -> None:
        model = mixture(experts=8, per_token=2)
        assert model.experts is not None
        routed = 7 * model.mlp_matrices(model.experts.ffn) * 2 / (3352e9 * SERVING.stream["hopper"])
        one, many = (cost(model).parts(0, 0, n, 0)["weights"] for n in (1, 512))
        assert many - one == pytest.approx(routed * (8 - 2), rel=1e-6)

    def test_a_latent_is_read_whole_on_every_rank(self) -> None:
        at = [cost(LATENT, layout=Layout(tp=tp)) for tp in (1, 8)]
        assert at[0].memory.kv_bytes_per_token == at[1].memory.kv_bytes_per_token == (256 + 16) * 2 * 8


class TestPrecision:
    @pytest.mark.parametrize(("precision", "share"), [("fp8", 0.5), ("int8", 0.5), ("int4", (0.5 + 2 / 128) / 2)])
    def test_weights_are_read_by_their_bytes(self, precision: str, share: float) -> None:
        model = load_model_spec("llama-3.1-70b")
        head = model.vocab * model.hidden * 2 / (3352e9 * SERVING.stream["hopper"])  # stays in 16 bits
        wide = cost(model).parts(0, 0, 1, 0)["weights"] - head
        narrow = cost(model, precision=precision).parts(0, 0, 1, 0)["weights"] - head
        assert narrow == pytest.approx(share * wide, rel=1e-3)

    def test_int4_multiplies_in_16_bits_and_fp8_in_8(self) -> None:
        prompt = (65_536.0, 0.0, 0.0, 0.0)
        wide, stored, multiplied = (
            cost(load_model_spec("llama-3.1-70b"), precision=p).parts(*prompt)["compute"]
            for p in ("bf16", "int4", "fp8")
        )
        assert stored == pytest.approx(wide, rel=0.02)
        assert multiplied < 0.65 * wide

    @pytest.mark.parametrize(("device", "precision"), [("A100-80GB-SXM", "fp8"), ("H100-SXM", "fp4"), ("B300", "int8")])
    def test_a_device_without_fast_units_multiplies_in_16_bits(self, device: str, precision: str) -> None:
        node = load_cluster(f"8x{device}")
        prompt = (65_536.0, 0.0, 0.0, 0.0)
        wide, narrow = (cost(cluster=node, precision=p).parts(*prompt)["compute"] for p in ("bf16", precision))
        assert narrow == pytest.approx(wide, rel=0.02)

    def test_scales_of_16_neighbours_take_a_kernel_for_every_product(self) -> None:
        node = load_cluster("8xB200")
        bf16, fp8, fp4 = (
            cost(cluster=node, precision=p, engine=TENSORRT_LLM).parts(0, 0, 1, 0)["launches"]
            for p in ("bf16", "fp8", "fp4")
        )
        assert fp8 == bf16
        assert fp4 - fp8 == pytest.approx(4 * 8 * SERVING.graph_kernel_s)  # four products in each of eight layers

    def test_narrow_keys_and_values_are_read_by_their_bytes(self) -> None:
        wide, narrow = (cost(kv_precision=p).parts(0, 0, 8, 9000)["kv"] for p in ("bf16", "fp8"))
        assert narrow == pytest.approx(wide / 2)


class TestEngine:
    def test_casts_apart_take_a_kernel_for_every_product(self) -> None:
        node = load_cluster("8xH100-SXM")
        bf16, fp8 = (
            cost(cluster=node, precision=p, engine=VLLM).parts(0, 0, 1, 0)["launches"] for p in ("bf16", "fp8")
        )
        assert fp8 - bf16 == pytest.approx(4 * 8 * SERVING.graph_kernel_s)

    def test_norms_in_all_reduces_take_no_kernels(self) -> None:
        apart = replace(TENSORRT_LLM, fused_all_reduce=False)
        for tp, saved in ((1, 0), (2, 4)):  # a norm and a residual behind each of two all-reduces
            separate, fused = (
                cost(layout=Layout(tp=tp), engine=engine).parts(0, 0, 1, 0)["launches"]
                for engine in (apart, TENSORRT_LLM)
            )
            assert separate - fused == pytest.approx(saved * 8 * SERVING.graph_kernel_s, abs=1e-12)

    def test_direct_all_reduces_help_small_messages(self) -> None:
        model, layout = load_model_spec("llama-3.1-70b"), Layout(tp=8)
        nccl = Engine(name="nccl", host="vllm", direct_all_reduce=False)
        step = (0, 0, 8, 8000)
        direct = cost(model, layout=layout).parts(*step)["all_reduce"]
        assert direct < 0.7 * cost(model, layout=layout, engine=nccl).parts(*step)["all_reduce"]

    def test_a_kernel_without_grouped_heads_reads_again(self) -> None:
        model, step = load_model_spec("llama-3.1-70b"), (0, 0, 64, 100_000)
        grouped, again = (cost(model, engine=engine).parts(*step)["kv"] for engine in (VLLM, TENSORRT_LLM_0_5))
        assert again == pytest.approx(grouped * 8 * SERVING.kv_gain / SERVING.cache_gain)

    def test_a_slow_host_bounds_a_small_step(self) -> None:
        priced = cost(engine=MEGATRON)
        issue = priced.stages[0].issue_s
        assert issue > 8 * 9 * SERVING.hosts["megatron-lm"].kernel_s
        assert priced.seconds(0, 0, 1, 1) == pytest.approx(issue + priced.host.step_s + priced.host.sequence_s)
        assert priced.seconds(20_000, 10**8, 0, 0) > 1.5 * issue

    def test_weights_may_be_read_for_every_sequence(self) -> None:
        model = load_model_spec("llama-3.1-8b")
        one, five = (cost(model, engine=MEGATRON).parts(0, 0, n, n)["weights"] for n in (1, 5))
        head = model.vocab * model.hidden * 2 / (3352e9 * SERVING.stream["hopper"])  # read once
        assert five - head == pytest.approx(5 * (one - head), rel=1e-3)

    @pytest.mark.parametrize(("sequences", "tokens", "parts"), [(1, 20, 1), (64, 60, 4), (96, 1, 3), (128, 1, 1)])
    def test_faster_transformer_cuts_batches_to_its_limit(self, sequences: int, tokens: int, parts: int) -> None:
        assert FASTER_TRANSFORMER.pipeline_parts(sequences, tokens, stages=3) == parts
        assert FASTER_TRANSFORMER.pipeline_parts(sequences, tokens, stages=1) == 1

    def test_host_times_belong_to_steps_and_sequences(self) -> None:
        constants = SERVING.with_values({"hosts.vllm.step_s": 5e-3, "hosts.vllm.sequence_s": 1e-4})
        assert constants.hosts["vllm"] == HostTimes(
            step_s=5e-3, sequence_s=1e-4, request_s=SERVING.hosts["vllm"].request_s
        )
        work = Serving(input_len=1, output_len=1)
        slow = step_cost(llama(), H100, Layout(), work, VLLM_0_6, constants)
        assert slow.parts(0, 0, 10, 0)["host"] == pytest.approx(6e-3)

    def test_a_host_that_is_ahead_is_waited_for_only_where_it_takes_longer(self) -> None:
        behind, ahead = (cost(layout=Layout(pp=2), engine=engine) for engine in (VLLM_0_6, VLLM))
        host_s = behind.parts(0, 0, 1, 100)["host"]
        small, large = (0, 0, 1, 100), (4000, 8_000_000, 8, 8000)
        assert ahead.seconds(*small) == ahead.interval_seconds(*small) == pytest.approx(host_s)
        assert sum(ahead.parts(*small).values()) == pytest.approx(host_s)
        assert ahead.parts(*large)["host"] == 0
        assert ahead.seconds(*large) == pytest.approx(behind.seconds(*large) - behind.parts(*large)["host"])

    def test_query_heads_of_a_group_read_by_themselves_beside_prompts_where_the_kernel_is_so(self) -> None:
        def kv(device: str, engine: Engine, prompt_tokens: int) -> Any:
            cluster = load_cluster(f"1x1x{device}")
            return cost(load_model_spec("llama-3.1-8b"), cluster, engine=engine).parts(prompt_tokens, 0, 32, 32_000)[
                "kv"
            ]

        for device, engine in (("H100-SXM", VLLM), ("A100-80GB-SXM", SGLANG)):
            assert kv(device, engine, 16) == kv(device, engine, 0)
        ratio = 4 * SERVING.kv_gain / SERVING.cache_gain  # 4 query heads a kv head, from the cache
        assert kv("A100-80GB-SXM", VLLM, 16) == pytest.approx(ratio * kv("A100-80GB-SXM", VLLM, 0))
        assert ratio > 2


def test_constants_are_replaced_by_name() -> None:
    changed = SERVING.with_values({"stream.gddr": 0.5, "kv_gain": 0.7})
    assert changed.values() == {**SERVING.values(), "stream.gddr": 0.5, "kv_gain": 0.7}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_len": 0}, "input-len must be at least 1, not 0"),
        ({"rate": 0.0}, "rate must be more than zero"),
        ({"precision": "fp2"}, "precision must be one of fp32"),
        ({"kv_precision": "fp4"}, "kv-precision must be one of fp32"),
    ],
)
def test_impossible_work_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Serving(**{"input_len": 8, "output_len": 8, **wrong})
