"""Bytes that the fullest rank holds, part by part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.hardware import Device
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.blocks import kv_heads_per_rank
from triaxial.plan.cost.operators import Shard, Size
from triaxial.plan.cost.practice import Practice
from triaxial.plan.layout_table import RECOMPUTES, LayoutTable
from triaxial.plan.pipeline.stages import Loads
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]

FRAMEWORK_RESERVE_BYTES = 1.5 * 2**30
"""CUDA context, NCCL channels and GEMM workspaces: what a process holds before its first tensor."""

USABLE_MEMORY = 0.94
"""Share of a device's memory that tensors may fill: the driver keeps some, the allocator's rounding loses some."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part on the fullest rank of each layout."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    logits: Floats
    communication: Floats
    reserve: Floats

    @property
    def peak(self) -> Floats:
        total: Floats = sum(self.parts().values(), np.zeros_like(self.parameters))
        return total

    def parts(self) -> dict[str, Floats]:
        return dict(vars(self))

    def on(self, device: Device) -> Memory:
        """The same on a device: a probed one has shown what a process holds before its first tensor."""
        if device.timings is None:
            return self
        return replace(self, reserve=np.full_like(self.reserve, device.timings.reserve_bytes))


def layer_weights(model: ModelSpec, tp: Size) -> Size:
    """Parameters of one dense decoder layer on one tp rank: matrices are cut, norms and few kv heads are not."""
    return outside_mlp_weights(model, tp) + model.mlp_matrices(model.ffn) / tp


def outside_mlp_weights(model: ModelSpec, tp: Size) -> Size:
    """Attention and norms of one decoder layer on one tp rank."""
    uncut = model.layer_parameters - model.attention_matrices - model.mlp_matrices(model.ffn)
    if model.latent:  # the low-rank projections down are not cut; they are a small part
        return model.attention_matrices / tp + uncut
    q = model.num_heads * model.head_dim / tp
    return model.hidden * (2 * q + 2 * kv_heads_per_rank(model, tp) * model.head_dim) + uncut


def routed_weights(model: ModelSpec, tp: Size, ep: Size) -> Size:
    """Parameters of one layer's routed experts on one rank."""
    if model.experts is None:
        return 0.0
    return model.experts.count / ep * model.mlp_matrices(model.experts.ffn) / tp


def rank_weights(model: ModelSpec, tp: Size, ep: Size, loads: Loads) -> tuple[Floats, Floats]:
    """Parameters on ranks: those that all data-parallel ranks hold, and the routed experts, spread over ep."""
    table = embedding_weights(model, tp)
    ends = loads.embedding + loads.head
    if model.tied_embeddings:  # one rank with both ends holds the shared table once
        ends = ends - loads.embedding * loads.head
    positions = model.max_positions * model.hidden if model.learned_positions else 0
    replicated = loads.dense_layers * layer_weights(model, tp) + ends * table + loads.embedding * positions
    if model.experts:
        router = model.hidden * model.experts.count
        shared = model.experts.shared * model.mlp_matrices(model.experts.ffn) / tp
        replicated = replicated + loads.expert_layers * (outside_mlp_weights(model, tp) + router + shared)
    return replicated, loads.expert_layers * np.asarray(routed_weights(model, tp, ep))


def expert_shards(table: LayoutTable) -> Floats:
    """Ranks over which ZeRO cuts one copy of an expert's state: ep of the data-parallel ranks hold other experts."""
    return np.maximum(table.state_shards / data_ep(table), 1)


def data_ep(table: LayoutTable) -> Floats:
    """Data-parallel ranks that hold different experts: ep without those of its ranks that tp has."""
    return table.ep / table.expert_folds


def embedding_weights(model: ModelSpec, tp: Size) -> Size:
    """Parameters of the token embedding on one tp rank; the output projection has as many."""
    return model.vocab * model.hidden / tp


def saved_layer_bytes(
    model: ModelSpec,
    training: Training,
    practice: Practice,
    shard: Shard,
    recompute: NDArray[np.int64],
    mlp_columns: Size,
) -> Size:
    """Activation bytes that one decoder layer keeps for its backward pass, one micro-batch.

    For GPT with dropout this is Korthikanti's s b h (10 + 24/t + 5 a s / (h t)) and its variants
    (arXiv 2205.05198, table 2), here for any widths, gated MLPs, grouped kv heads and fused attention.

    Args:
        recompute: position in `RECOMPUTES`; selective drops the attention core, full keeps the layer's input only.
        mlp_columns: elements per token that the feed-forward part keeps.
    """
    element = training.element_bytes
    tokens, outside = shard.tokens(training.seq_len), shard.tokens_outside_tp(training.seq_len)
    q = model.attention_width / shard.tp
    kv = kv_heads_per_rank(model, shard.tp) * model.attention_width / model.num_heads
    # two norms with their outputs, and a one-byte mask for each dropout
    around = outside * model.hidden * (4 * element + (2 if practice.dropout else 0))
    projections = tokens * element * (2 * q + 2 * kv)
    kept = around + projections + tokens * element * mlp_columns
    core = attention_core_bytes(model, training, practice, shard)
    selective = kept if practice.selective == "attention" else (kept + core) / 2
    return np.select(
        [recompute == RECOMPUTES.index("full"), recompute == RECOMPUTES.index("selective")],
        [outside * model.hidden * element * np.ones_like(kept), selective],
        kept + core,
    )


def dense_mlp_columns(model: ModelSpec, practice: Practice, shard: Shard) -> Size:
    """Elements per token that a dense feed-forward layer keeps: what its activation reads and writes."""
    return kept_branches(model, practice) * model.ffn / shard.tp


def expert_mlp_columns(model: ModelSpec, practice: Practice, shard: Shard) -> Size:
    """The same of a layer with experts: dispatched tokens and their results besides."""
    if model.experts is None:
        return 0.0
    routed, shared = model.experts.per_token, model.experts.shared
    inside = kept_branches(model, practice) * (routed + shared) * model.experts.ffn / shard.tp
    return inside + 2 * routed * model.hidden


def kept_branches(model: ModelSpec, practice: Practice) -> int:
    """Tensors as wide as the feed-forward layer: input and output of GELU; gate, up, their product, and SiLU's output
    unless fused."""
    return (3 if practice.fused_passes else 4) if model.gated_mlp else 2


def attention_core_bytes(model: ModelSpec, training: Training, practice: Practice, shard: Shard) -> Size:
    """What attention keeps inside its core: one fp32 statistic a row when fused, else softmax, mask and dropout."""
    rows = shard.tokens(training.seq_len) * model.num_heads / shard.tp
    if practice.attention != "unfused":
        return 4 * rows
    element = training.element_bytes
    return rows * training.seq_len * (2 * element + 1 if practice.dropout else element)


def logits_bytes(model: ModelSpec, training: Training, shard: Shard) -> Size:
    """Logits and their gradient in fp32, both alive when the loss turns around, and the 16-bit logits before them."""
    each = 4 + 4 + (training.element_bytes if training.element_bytes < 4 else 0)
    return shard.tokens(training.seq_len) * model.vocab / shard.tp * each


def activation_bytes(
    model: ModelSpec, training: Training, practice: Practice, table: LayoutTable, loads: Loads, shard: Shard
) -> Floats:
    """What ranks keep of all micro-batches in flight, [candidates, layouts]."""
    columns = (dense_mlp_columns(model, practice, shard), expert_mlp_columns(model, practice, shard))
    never = np.zeros_like(table.recompute)
    dense, expert = (
        saved_layer_bytes(model, training, practice, shard, table.recompute, mlp_columns=wide) for wide in columns
    )
    whole = saved_layer_bytes(model, training, practice, shard, never, mlp_columns=np.maximum(*columns))
    has_layers = loads.dense_layers + loads.expert_layers > 0
    # full recomputation rebuilds one layer at a time
    rebuilt = np.where((table.recompute == RECOMPUTES.index("full")) & has_layers, whole, 0)
    total: Floats = loads.in_flight * (loads.dense_layers * dense + loads.expert_layers * expert) + rebuilt
    return total


def communication_bytes(
    model: ModelSpec, training: Training, practice: Practice, table: LayoutTable, loads: Loads, shard: Shard
) -> Floats:
    """Buffers, [candidates, layouts]: ZeRO-3 holds two gathered layers and one unreduced gradient while they are in
    use, ZeRO-2 one unreduced gradient; a pipeline one message each way."""
    layer = layer_weights(model, table.tp)
    if model.experts:
        layer = outside_mlp_weights(model, table.tp) + routed_weights(model, table.tp, data_ep(table))
    has_layers = loads.dense_layers + loads.expert_layers > 0
    ends = (loads.embedding + loads.head > 0) * embedding_weights(model, table.tp)
    largest = np.maximum(np.where(has_layers, layer, 0), ends)
    sharded = table.state_shards > 1
    gathered = np.where((table.zero >= 3) & sharded, 2 * training.element_bytes * largest, 0)
    unreduced = np.where((table.zero >= 2) & sharded, practice.reduce_bytes * largest, 0)
    boundary = shard.tokens(training.seq_len) * model.hidden * training.element_bytes
    total: Floats = gathered + unreduced + np.where(table.pp > 1, 2 * boundary, 0)
    return total


def memory(
    model: ModelSpec, training: Training, practice: Practice, table: LayoutTable, loads: Loads, shard: Shard
) -> Memory:
    """Bytes of the fullest rank of every layout.

    Args:
        loads: candidates for the fullest rank, [candidates, layouts].
        shard: the same layouts' shards.
    """
    replicated, routed = rank_weights(model, table.tp, data_ep(table), loads)
    whole = replicated + routed
    sharded = replicated / table.state_shards + routed / expert_shards(table)

    def stored(bytes_each: int, sharded_from: int) -> Floats:
        return bytes_each * np.where(table.zero >= sharded_from, sharded, whole)

    parts = (
        stored(training.element_bytes, 3),
        stored(practice.gradient_bytes, 2),
        stored(training.state_bytes, 1),
        activation_bytes(model, training, practice, table, loads, shard),
        loads.head * logits_bytes(model, training, shard),
        communication_bytes(model, training, practice, table, loads, shard),
        np.full(whole.shape, FRAMEWORK_RESERVE_BYTES),
    )
    fullest = sum(parts, np.zeros_like(whole)).argmax(axis=0)
    layouts = np.arange(len(table))
    return Memory(*(part[fullest, layouts] for part in parts))
