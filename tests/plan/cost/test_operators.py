"""What a rank is said to run is what the model computes, however it is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.plan.shapes import gpt, llama, mixture
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.cost.blocks import dense_layer, embedding, expert_layer, head
from triaxial.plan.cost.operators import Attention, Block, Collective, Gemm, Operator, Pass, Shard, linear
from triaxial.plan.cost.practice import OURS, Practice
from triaxial.plan.validation.practices import MEGATRON_2022
from triaxial.plan.workload import Training

WORK = Training(global_batch=8, seq_len=1024)


def shard(tp: int = 1, cp: int = 1, ep: int = 1, mb: int = 1, sp: bool = False) -> Shard:
    return Shard(tp=float(tp), cp=float(cp), ep=float(ep), mb=float(mb), sp=sp)


def gemm_flop(operators: Iterable[Operator]) -> float:
    return sum(float(2 * op.m * op.n * op.k * op.batch) for op in operators if isinstance(op, Gemm) and op.narrow)


def sent(operators: Iterable[Operator], kind: str, axis: str) -> list[float]:
    found = [op for op in operators if isinstance(op, Collective) and op.kind == kind and op.axis == axis]
    return [float(op.bytes) for op in found if float(op.bytes) > 0]


def whole_model(model: ModelSpec, practice: Practice = OURS) -> Block:
    layers = [dense_layer(model, WORK, shard(), practice)] * model.num_dense_layers
    if model.experts:
        layers += [expert_layer(model, WORK, shard(), practice)] * (model.num_layers - model.num_dense_layers)
    return sum(layers, embedding(model, WORK, shard(), practice)) + head(model, WORK, shard(), practice)


@pytest.mark.parametrize(
    "model",
    [llama(), gpt("gpt", 4, 1024, 16), mixture(), load_model_spec("llama-3.1-8b"), load_model_spec("deepseek-v3")],
    ids=lambda model: model.name,
)
def test_matrix_products_are_two_flop_for_each_parameter_and_token(model: ModelSpec) -> None:
    block = whole_model(model)
    forward = 2 * model.matmul_parameters * WORK.seq_len
    assert gemm_flop(block.forward) == pytest.approx(forward)
    assert gemm_flop(block.input_grad) == pytest.approx(forward)
    assert gemm_flop(block.weight_grad) == pytest.approx(forward)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_tensor_parallel_ranks_share_the_products_evenly(tp: int) -> None:
    whole, part = (gemm_flop(dense_layer(llama(), WORK, shard(tp=n), OURS).forward) for n in (1, tp))
    assert part * tp == pytest.approx(whole)


def test_a_product_adds_to_a_buffer_of_its_own_type_by_itself() -> None:
    """In fp32 the sums of weight gradients have the products' type, in bf16 they do not."""
    wide, narrow = (
        linear(64, 512, 256, Training(global_batch=8, seq_len=64, precision=precision), OURS).weight_grad
        for precision in ("fp32", "bf16")
    )
    assert wide == (Gemm(256, 512, 64),)
    assert narrow == (Gemm(256, 512, 64), Pass(256 * 512 * (4 + 4 + 2)))


def test_few_kv_heads_are_replicated_and_cost_more() -> None:
    model = llama(kv_heads=2)
    whole, part = (gemm_flop(dense_layer(model, WORK, shard(tp=n), OURS).forward) for n in (1, 8))
    assert part * 8 > whole


def test_a_layer_makes_two_all_reduces_each_way() -> None:
    """arXiv 1909.08053, section 3: f and g around attention and around the MLP."""
    layer = dense_layer(llama(), WORK, shard(tp=4), OURS)
    boundary = 1024 * 1024 * 2
    assert sent(layer.forward, "all_reduce", "tp") == [boundary] * 2
    assert sent(layer.input_grad, "all_reduce", "tp") == [boundary] * 2
    assert sent(layer.forward + layer.input_grad, "all_gather", "tp") == []


def test_sequence_parallelism_halves_each_all_reduce_into_a_gather_and_a_scatter() -> None:
    """arXiv 2205.05198, section 4.2.2."""
    layer = dense_layer(llama(), WORK, shard(tp=4, sp=True), OURS)
    for phase in (layer.forward, layer.input_grad):
        assert len(sent(phase, "all_gather", "tp")) == len(sent(phase, "reduce_scatter", "tp")) == 2
        assert sent(phase, "all_reduce", "tp") == []


def test_context_parallelism_sends_keys_and_values() -> None:
    layer = dense_layer(llama(), WORK, shard(cp=2), OURS)
    keys_and_values = 2 * 1024 * 8 * 64 * 2
    assert sent(layer.forward, "all_gather", "cp") == [keys_and_values]
    assert sent(layer.input_grad, "reduce_scatter", "cp") == [keys_and_values]


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_context_parallel_ranks_share_causal_attention_evenly_and_add_up_what_each_step_gives(cp: int) -> None:
    """Early and late parts of the sequence on every rank (arXiv 2310.01889; balanced as in Megatron)."""
    layer = dense_layer(llama(), WORK, shard(cp=cp), OURS)
    (core,) = (op for op in layer.forward if isinstance(op, Attention))
    assert float(core.queries * (core.keys - core.queries / 2)) * cp == pytest.approx(1024**2 / 2)
    alone = dense_layer(llama(), WORK, shard(), OURS)
    assert core.kernels == cp
    steps, width, key_width = cp - 1, 1024, 512
    for part, each in (("forward", 34 * width), ("input_grad", 18 * (width + 2 * key_width))):
        summed, whole = (
            sum(float(op.bytes) for op in getattr(one, part) if isinstance(op, Pass)) for one in (layer, alone)
        )
        assert summed - whole / cp == pytest.approx(each * steps * (1024 / cp))


def test_experts_get_every_token_copy_and_send_it_back() -> None:
    layer = expert_layer(mixture(), WORK, shard(ep=4), OURS)
    copies = 1024 * 2 * 1024 * 2
    assert sent(layer.forward, "all_to_all", "ep") == [copies] * 2
    assert sent(layer.input_grad, "all_to_all", "ep") == [copies] * 2


def test_spreading_experts_does_not_change_the_products_of_a_rank() -> None:
    one, four = (gemm_flop(expert_layer(mixture(), WORK, shard(ep=ep), OURS).forward) for ep in (1, 4))
    assert four == pytest.approx(one)


def test_folding_experts_over_tensor_parallel_ranks_keeps_their_products_whole() -> None:
    """Parallel folding (arXiv 2504.14960): as much arithmetic as with every expert cut in two, in products twice as
    wide, and as much sent."""
    cut = expert_layer(mixture(), WORK, shard(tp=2, ep=2, sp=True), OURS)
    folded = expert_layer(mixture(), WORK, replace(shard(tp=2, ep=4, sp=True), folds=2.0), OURS)
    assert gemm_flop(folded.forward) == pytest.approx(gemm_flop(cut.forward))
    widths = [
        {float(op.n) for op in block.forward if isinstance(op, Gemm) and op.batch != 1} for block in (cut, folded)
    ]
    assert widths == [{512, 1024}, {1024}]
    assert sent(folded.forward, "all_to_all", "ep") == sent(cut.forward, "all_to_all", "ep")


def test_unfused_attention_multiplies_all_scores_and_fused_attention_is_one_kernel() -> None:
    unfused = dense_layer(llama(), WORK, shard(), MEGATRON_2022).core
    products = [op for op in unfused if isinstance(op, Gemm)]
    assert sum(float(2 * op.m * op.n * op.k * op.batch) for op in products) == 4 * 16 * 1024 * 1024 * 64
    fused = dense_layer(llama(), WORK, shard(), OURS).core
    assert [type(op) for op in fused] == [Attention]
