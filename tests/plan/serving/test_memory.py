"""What a replica holds, against sizes worked out by hand."""

from __future__ import annotations

import pytest

from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.memory import ServingMemory, serving_memory
from triaxial.plan.serving.engine import VLLM
from triaxial.plan.serving.workload import KVPrecision, Serving, WeightPrecision

CLUSTER = load_cluster("2x8xH100-SXM")


def memory(
    name: str, layout: Layout, precision: WeightPrecision = "bf16", kv_precision: KVPrecision = "bf16"
) -> ServingMemory:
    work = Serving(input_len=1024, output_len=256, precision=precision, kv_precision=kv_precision)
    return serving_memory(load_model_spec(name), CLUSTER, layout, work, VLLM)


def test_llama_8b_on_one_gpu() -> None:
    held = memory("llama-3.1-8b", Layout())
    assert held.weights_bytes == pytest.approx(8_030_261_248 * 2, rel=1e-5)  # its parameters
    assert held.kv_bytes_per_token == 2 * 8 * 128 * 32 * 2  # k and v, heads, head_dim, layers, bytes
    assert held.capacity_bytes == pytest.approx(0.9 * 81_559 * 2**20)
    free = held.capacity_bytes - held.weights_bytes - held.workspace_bytes
    assert held.max_kv_tokens == int(free / 131_072)
    assert held.max_sequences(1000) == int(free / 131_072_000)


def test_tensor_parallel_cuts_weights_and_kv_heads() -> None:
    whole, cut = (memory("llama-3.1-70b", Layout(tp=tp)) for tp in (1, 8))
    assert cut.weights_bytes == pytest.approx(whole.weights_bytes / 8, rel=1e-3)
    assert cut.kv_bytes_per_token == whole.kv_bytes_per_token / 8
    assert memory("llama-3.1-70b", Layout(tp=16)).kv_bytes_per_token == cut.kv_bytes_per_token  # 8 kv heads
    assert whole.max_sequences(1) == 0  # 141 GB do not fit on one GPU
    assert whole.max_kv_tokens == 0


def test_the_fullest_stage_has_most_layers_and_an_end() -> None:
    model = load_model_spec("llama-3.1-8b")
    held = memory("llama-3.1-8b", Layout(pp=4))
    layers = 8 * model.layer_parameters
    assert held.weights_bytes == pytest.approx(2 * (layers + model.vocab * model.hidden), rel=1e-5)
    assert held.kv_bytes_per_token == 131_072 / 4


def test_quantised_weights_and_caches() -> None:
    wide, narrow = (memory("llama-3.1-70b", Layout(tp=4), p, kv) for p, kv in (("bf16", "bf16"), ("fp8", "fp8")))  # type: ignore[arg-type]
    ends = 2 * 128_256 * 8192 / 4 * 2
    assert narrow.weights_bytes - ends == pytest.approx((wide.weights_bytes - ends) / 2)
    assert narrow.kv_bytes_per_token == wide.kv_bytes_per_token / 2


def test_experts_are_all_held() -> None:
    model = load_model_spec("mixtral-8x7b")
    held = memory("mixtral-8x7b", Layout(tp=2))
    assert held.weights_bytes == pytest.approx(model.parameters, rel=1e-3)  # two bytes over two ranks


def test_a_windowed_cache_stops_growing() -> None:
    model = load_model_spec("llama-3.1-8b").model_copy(update={"sliding_window": 100, "first_windowed_layer": 16})
    held = serving_memory(model, CLUSTER, Layout(), Serving(input_len=1, output_len=1), VLLM)
    assert held.sequence_bytes(100) == 100 * 131_072
    assert held.sequence_bytes(300) == (100 + 300) / 2 * 131_072
    assert held.max_sequences(300) == pytest.approx(held.kv_bytes_free / (200 * 131_072), abs=1)
