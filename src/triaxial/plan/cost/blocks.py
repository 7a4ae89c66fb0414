"""The list of what a rank runs for each kind of block and one micro-batch: priced by the planner, counted by the runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.operators import (
    Attention,
    Block,
    Collective,
    Gemm,
    Operator,
    Pass,
    Shard,
    Size,
    accumulation,
    linear,
    passes,
)
from triaxial.plan.cost.practice import Practice
from triaxial.plan.workload import Training

ALIGNED_ELEMENTS = 8
"""Elements of 16 bits in the 16 bytes that matrix units load at once."""
UNALIGNED_SLOWDOWN = 2.5
"""Of a product whose operand has rows that start elsewhere. Padding GPT-2's vocabulary from 50,257 to 50,304 took a
quarter off nanoGPT's step on an A100 (A. Karpathy, February 2023), of which the head's two gradients, the products
that read the logits' rows, are a fifth."""


def enter_tensor_parallel(model: ModelSpec, training: Training, shard: Shard) -> Block:
    """Megatron's f (arXiv 1909.08053): nothing forward, all-reduce backward; with sequence parallelism g-bar
    (arXiv 2205.05198): all-gather forward, reduce-scatter backward."""
    size = shard.tokens(training.seq_len) * model.hidden * training.element_bytes
    return Block(
        (Collective("all_gather", size * np.where(shard.sp, 1, 0), "tp"),),
        (
            Collective("reduce_scatter", size * np.where(shard.sp, 1, 0), "tp"),
            Collective("all_reduce", size * np.where(shard.sp, 0, 1), "tp"),
        ),
    )


def leave_tensor_parallel(model: ModelSpec, training: Training, shard: Shard) -> Block:
    """The conjugate of `enter_tensor_parallel`: its forward is that one's backward."""
    entering = enter_tensor_parallel(model, training, shard)
    return Block(entering.input_grad, entering.forward)


def norm(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """RMSNorm or LayerNorm: read, write; backward reads the input and its output's gradient and writes one."""
    size = shard.tokens_outside_tp(training.seq_len) * model.hidden * training.element_bytes
    # LayerNorm has long been one kernel in PyTorch; RMSNorm is square, mean, root, product, product unless fused
    return passes(2 * size, 3 * size, practice, unfused_kernels=1 if model.layer_norm else 5)


def residual(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """The residual addition, with bias and dropout where the model has them: two reads, one write. Backward, the
    gradients of the two branches are added as well."""
    size = shard.tokens_outside_tp(training.seq_len) * model.hidden * training.element_bytes
    added = Block(input_grad=(Pass(3 * size),))
    if practice.dropout:
        return added + passes(3.5 * size, 2.5 * size, practice, unfused_kernels=3)
    return added + Block((Pass(3 * size),))


def attention_core(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """Scores, softmax and weighted sum of values, fused or as matrix multiplications around a softmax."""
    heads, kv_heads = model.num_heads / shard.tp, kv_heads_per_rank(model, shard.tp)
    head_dim = model.attention_width / model.num_heads
    queries, keys = training.seq_len / shard.cp, training.seq_len * np.ones_like(shard.cp, dtype=float)
    if model.sliding_window:
        keys = np.minimum(keys, model.sliding_window)
    if practice.attention != "unfused":
        # each cp rank has an early and a late part of the sequence: its queries see half of the keys on average,
        # as many as if they were the last of these
        balanced = np.minimum(keys, (training.seq_len + queries) / 2)
        sizes = (shard.mb, heads, kv_heads, queries, balanced, head_dim)
        kernel = Attention(*sizes, kernel=practice.attention, kernels=shard.cp)
        forward: tuple[Operator, ...] = (kernel,)
        fused = Block(forward, (replace(kernel, backward=True),), core=forward)
        return fused + ring_sums(shard, queries * head_dim * heads, queries * head_dim * kv_heads)
    batch = shard.mb * heads
    scores = batch * queries * keys * training.element_bytes
    inner = Gemm(queries, keys, head_dim, batch, narrow=False)
    outer = Gemm(queries, head_dim, keys, batch, narrow=False)
    # heads lie beside each other in the projection, and apart in the products
    copied = Pass(2 * shard.mb * heads * queries * head_dim * training.element_bytes)
    softmax, softmax_gradient = softmax_passes(batch, scores)
    # dropout reads the probabilities, writes them and a one-byte mask
    dropout = (Pass(2.5 * scores),) if practice.dropout else ()
    forward = (inner, softmax, *dropout, outer, copied)
    backward = (copied, outer, inner, *dropout, softmax_gradient, outer, outer)
    return Block(forward, backward, core=forward)


def ring_sums(shard: Shard, outputs: Size, keys: Size) -> Block:
    """Ring attention (arXiv 2310.01889) adds up in fp32 what each of its cp steps gives: the output forward, the
    gradients of queries, keys and values backward. Operation by operation in every program: Transformer Engine's and
    PyTorch's rings are eager code around their kernels.

    Args:
        outputs: elements of one sequence's queries on a rank; `keys` those of its keys.
    """
    steps = np.asarray(shard.cp) - 1
    # forward, the sum is scaled (8 bytes), the step's result cast (6) and scaled (8), and the two added (12); backward,
    # the gradient is cast and added
    forward, backward = 34 * steps * shard.mb * outputs, 18 * steps * shard.mb * (outputs + 2 * keys)
    return Block((Pass(forward, 4 * steps),), (Pass(backward, 2 * steps),))


def softmax_passes(matrices: Size, scores: Size) -> tuple[Pass, Pass]:
    """Masked softmax over `scores` bytes, forward and backward, outside a fused attention.

    Megatron's kernel reads and writes them, or reads two and writes one; but it takes four attention matrices at a
    time (`is_kernel_available` of its fused_softmax.py). Other numbers are cast to fp32, scaled, masked, normalised
    and cast back one after the other.
    """
    fused = np.asarray(matrices) % 4 == 0
    return (
        Pass(scores * np.where(fused, 2, 18), np.where(fused, 1, 5)),
        Pass(scores * np.where(fused, 3, 20), np.where(fused, 1, 5)),
    )


def kv_heads_per_rank(model: ModelSpec, tp: Size) -> Size:
    """Key/value heads on one tp rank: fewer than tp are replicated; latent attention expands to one a query head."""
    return np.maximum((model.num_heads if model.latent else model.num_kv_heads) / tp, 1)


def context_exchange(model: ModelSpec, training: Training, shard: Shard) -> Block:
    """Context parallelism passes keys and values around: once forward, again backward with their gradients."""
    kv = 2 * kv_heads_per_rank(model, shard.tp) * model.attention_width / model.num_heads
    size = shard.mb * training.seq_len * kv * training.element_bytes * np.where(np.asarray(shard.cp) > 1, 1, 0)
    gather, scatter = Collective("all_gather", size, "cp"), Collective("reduce_scatter", size, "cp")
    return Block((gather,), (gather, scatter))


def projections_in(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """Queries, keys and values, with their rotary positions."""
    tokens = shard.tokens(training.seq_len)
    if model.latent:
        latent, heads = model.latent, model.num_heads / shard.tp
        query = heads * (latent.nope_dim + latent.rope_dim)
        into_query = (
            linear(tokens, query, model.hidden, training, practice)
            if latent.query_rank is None
            else linear(tokens, latent.query_rank, model.hidden, training, practice)
            + linear(tokens, query, latent.query_rank, training, practice)
        )
        expanded = heads * (latent.nope_dim + latent.value_dim)
        compressed = linear(tokens, latent.kv_rank + latent.rope_dim, model.hidden, training, practice)
        rotary = 2 * tokens * heads * 2 * latent.rope_dim * training.element_bytes
        return (
            into_query
            + compressed
            + linear(tokens, expanded, latent.kv_rank, training, practice)
            + passes(rotary, rotary, practice, unfused_kernels=6)
        )
    q = model.num_heads * model.head_dim / shard.tp
    kv = kv_heads_per_rank(model, shard.tp) * model.head_dim
    # the gradients of queries, keys and values are put together again
    joined = Block(input_grad=(Pass(2 * tokens * (q + 2 * kv) * training.element_bytes),))
    fused = linear(tokens, q + 2 * kv, model.hidden, training, practice, bias=model.qkv_bias) + joined
    if model.learned_positions:
        return fused
    rotary = 2 * tokens * (q + kv) * training.element_bytes
    return fused + passes(rotary, rotary, practice, unfused_kernels=6)


def attention(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """Norm, projections, attention core, output projection, residual."""
    value = model.latent.value_dim if model.latent else model.head_dim
    tokens = shard.tokens(training.seq_len)
    return (
        norm(model, training, shard, practice)
        + enter_tensor_parallel(model, training, shard)
        + projections_in(model, training, shard, practice)
        + context_exchange(model, training, shard)
        + attention_core(model, training, shard, practice)
        + linear(tokens, model.hidden, model.num_heads * value / shard.tp, training, practice, bias=model.out_bias)
        + leave_tensor_parallel(model, training, shard)
        + residual(model, training, shard, practice)
    )


def activation(width: Size, tokens: Size, gated: bool, training: Training, practice: Practice) -> Block:
    """SwiGLU or GELU over `width` columns: reads its one or two inputs, writes one; backward writes their gradients."""
    size = tokens * width * training.element_bytes
    inputs = 2 if gated else 1
    return passes((inputs + 1) * size, (2 * inputs + 1) * size, practice, unfused_kernels=inputs)


def mlp(model: ModelSpec, width: Size, training: Training, shard: Shard, practice: Practice) -> Block:
    """The two (gated: fused gate and up, then down) projections of a dense feed-forward layer `width` wide."""
    tokens, own = shard.tokens(training.seq_len), width / shard.tp
    return (
        linear(tokens, (2 if model.gated_mlp else 1) * own, model.hidden, training, practice, bias=model.mlp_bias)
        + activation(own, tokens, model.gated_mlp, training, practice)
        + linear(tokens, model.hidden, own, training, practice, bias=model.mlp_bias)
    )


def dense_layer(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """One decoder layer without experts."""
    return (
        attention(model, training, shard, practice)
        + norm(model, training, shard, practice)
        + enter_tensor_parallel(model, training, shard)
        + mlp(model, model.ffn, training, shard, practice)
        + leave_tensor_parallel(model, training, shard)
        + residual(model, training, shard, practice)
    )


def expert_layer(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """One decoder layer with experts, tokens spread evenly over them.

    Each rank sends its tokens' copies to the ranks of their experts and gets them back (arXiv 2006.16668); on an
    expert's rank they meet those of the other ep ranks. Where ep reaches over tp ranks, fewer of these cut an expert.
    """
    experts = model.experts
    assert experts is not None
    tokens = shard.tokens(training.seq_len)
    copies = tokens * experts.per_token / shard.folds
    local = experts.count / shard.ep
    rows = copies / local  # as many arrive from the other ranks as are sent to them
    width = experts.ffn / (shard.tp / shard.folds)
    size = shard.tokens_outside_tp(training.seq_len) * experts.per_token * model.hidden * training.element_bytes
    exchange = Collective("all_to_all", size * np.where(np.asarray(shard.ep) > 1, 1, 0), "ep")
    permute = passes(
        2 * copies * model.hidden * training.element_bytes,
        2 * copies * model.hidden * training.element_bytes,
        practice,
        3,
    )
    move = Block((exchange,), (exchange,)) + permute
    up = (2 if model.gated_mlp else 1) * width
    shared = mlp(model, experts.shared * experts.ffn, training, shard, practice) if experts.shared else Block()
    return (
        attention(model, training, shard, practice)
        + norm(model, training, shard, practice)
        + enter_tensor_parallel(model, training, shard)
        + linear(tokens, float(experts.count), model.hidden, training, practice)
        + move
        + linear(rows, up, model.hidden, training, practice, batch=local)
        + activation(width, copies, model.gated_mlp, training, practice)
        + linear(rows, model.hidden, width, training, practice, batch=local)
        + move
        + shared
        + leave_tensor_parallel(model, training, shard)
        + residual(model, training, shard, practice)
    )


def embedding(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """The vocabulary-parallel table look-up; its gradient is as large as the table."""
    size = shard.tokens(training.seq_len) * model.hidden * training.element_bytes
    table = model.vocab * model.hidden / shard.tp
    reduced = leave_tensor_parallel(model, training, shard)
    # the look-up's gradient is a full table: cleared, scattered into, then added
    scatter = (Pass(table * training.element_bytes), Pass(3 * size), *accumulation(table, training, practice))
    return Block((Pass(2 * size), *reduced.forward), reduced.input_grad, scatter)


def head(model: ModelSpec, training: Training, shard: Shard, practice: Practice) -> Block:
    """Final norm, vocabulary-parallel output projection, cross-entropy in fp32."""
    tokens, vocab = shard.tokens(training.seq_len), model.vocab / shard.tp
    logits = tokens * vocab
    # fused: cast to fp32 and read twice; gradient in 16 bit. Eager: cast (6), log-softmax (12); its backward (12 + 4),
    # cast back (6) bytes a logit
    loss = (
        Block((Pass(14 * logits, 2),), (Pass(6 * logits),))
        if practice.fused_passes
        else Block((Pass(18 * logits, 4),), (Pass(22 * logits, 4),))
    )
    aligned = practice.pads_vocabulary or np.floor(vocab) % ALIGNED_ELEMENTS == 0
    product = linear(tokens, vocab, model.hidden, training, practice)
    product = product.with_slower_gradients(np.where(aligned, 1.0, UNALIGNED_SLOWDOWN))
    statistics = tuple(Collective("all_reduce", 4 * tokens, "tp") for _ in range(3))  # maximum, target, sum
    return (
        norm(model, training, shard, practice)
        + enter_tensor_parallel(model, training, shard)
        + product
        + loss
        + Block(statistics)
    )
