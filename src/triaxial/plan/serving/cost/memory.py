"""Bytes that the fullest rank of a replica holds, and how many sequences fit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.attention import kv_bytes
from triaxial.plan.serving.cost.stage import layer_bounds
from triaxial.plan.serving.engine import VLLM, Engine
from triaxial.plan.serving.workload import STORED_BYTES, Serving
from triaxial.plan.training.memory import FRAMEWORK_RESERVE_BYTES, layer_weights, outside_mlp_weights, routed_weights


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of the fullest rank of one replica."""

    capacity_bytes: float
    """What the engine fills of the device's memory."""
    weights_bytes: float
    workspace_bytes: float
    """Activations of the largest step, logits, and the framework's reserve."""
    kv_bytes_per_token: float
    """Keys and values of one token on this rank, in all its layers."""
    windowed_share: float
    """Of that, the part in layers whose cache stops growing at `window` tokens."""
    window: int

    @property
    def kv_bytes_free(self) -> float:
        """Bytes left for keys and values; negative where not even the weights fit."""
        return self.capacity_bytes - self.weights_bytes - self.workspace_bytes

    @property
    def max_kv_tokens(self) -> int:
        """Tokens that all running sequences together can hold."""
        return max(0, int(self.kv_bytes_free / self.kv_bytes_per_token))

    @property
    def farthest_window(self) -> int | None:
        """Keys that the farthest-seeing layer sees; None: all of them."""
        return self.window if self.windowed_share == 1 else None

    def sequence_bytes(self, tokens: float) -> float:
        """Keys and values of a sequence of so many tokens."""
        windowed = min(tokens, self.window) if self.windowed_share else tokens
        held = (1 - self.windowed_share) * tokens + self.windowed_share * windowed
        return held * self.kv_bytes_per_token

    def max_sequences(self, tokens: float) -> int:
        """Sequences of so many tokens that fit at a time."""
        return max(0, int(self.kv_bytes_free / self.sequence_bytes(tokens)))


def serving_memory(
    model: ModelSpec, cluster: Cluster, layout: Layout, work: Serving, engine: Engine = VLLM
) -> ServingMemory:
    """Bytes of the rank that holds most: the first stage has the embedding, the last one the head."""
    tp = layout.tp
    stages = [(first, end) for first, end in pairwise(layer_bounds(model, layout, engine)) if first < end]
    weights = [_stage_weights(model, tp, work, first, end) for first, end in stages]
    fullest = weights.index(max(weights))
    first, end = stages[fullest]
    windowed = max(0, end - max(first, model.first_windowed_layer)) if model.sliding_window else 0
    element = activation_bytes(work)
    activations = work.chunk_tokens * (4 * model.hidden + 3 * model.ffn / tp) * element
    logits = work.max_batch * model.vocab * (element + 4)  # and fp32 to sample from
    probed = cluster.device.timings
    return ServingMemory(
        capacity_bytes=cluster.device.memory_bytes * engine.memory_share,
        weights_bytes=weights[fullest],
        workspace_bytes=(probed.reserve_bytes if probed else FRAMEWORK_RESERVE_BYTES) + activations + logits,
        kv_bytes_per_token=kv_bytes(model, tp, work.kv_precision) * (end - first),
        windowed_share=windowed / (end - first),
        window=model.sliding_window or 0,
    )


def activation_bytes(work: Serving) -> float:
    """Bytes of an activation, and of a weight that is never quantised."""
    return max(2.0, STORED_BYTES[work.precision])


def _stage_weights(model: ModelSpec, tp: int, work: Serving, first: int, end: int) -> float:
    """Bytes of the weights of layers `first` to `end` (exclusive) and of the table and head that stage holds."""
    num_dense = max(0, min(end, model.num_dense_layers) - first)
    in_layers = num_dense * float(layer_weights(model, tp))
    if model.experts:
        shared = model.experts.shared * model.mlp_matrices(model.experts.ffn) / tp
        router = model.hidden * model.experts.count
        routed = float(routed_weights(model, tp, 1))
        each = float(outside_mlp_weights(model, tp)) + router + shared + routed
        in_layers += (end - first - num_dense) * each
    ends = (first == 0) + (end == model.num_layers)
    if model.tied_embeddings:
        ends = min(ends, 1)
    return in_layers * STORED_BYTES[work.precision] + ends * model.vocab * model.hidden / tp * activation_bytes(work)
