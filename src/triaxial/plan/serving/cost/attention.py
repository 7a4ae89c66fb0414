"""`AttentionCost`: seconds of attention as lines in the pairs that prompts make and the tokens that decoding reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.hardware import BYTES_PER_ELEMENT
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.blocks import kv_heads_per_rank
from triaxial.plan.cost.compute import attention_seconds
from triaxial.plan.cost.constants import COMPUTE
from triaxial.plan.serving.cost.pricing import Pricer
from triaxial.plan.serving.workload import KVPrecision

Number = float | NDArray[np.float64]


@dataclass(frozen=True)
class AttentionCost:
    """Attention of one stage's layers on one rank: some see everything, some the last `window` tokens."""

    full_layers: int
    windowed_layers: int
    window: int
    pair_s: float
    """Seconds of one query with one key in one layer, all heads of the rank."""
    token_s: float
    """Seconds to read one token's keys and values in one layer."""
    mixed_token_s: float
    """The same in a step that prompts are in too."""

    def prefill_seconds(self, tokens: Number, pairs: Number) -> Number:
        """Prompts of `tokens` in all, whose queries see `pairs` keys in all."""
        seen = self.full_layers * pairs
        if self.windowed_layers:
            seen = seen + self.windowed_layers * np.minimum(pairs, tokens * float(self.window))
        return seen * self.pair_s

    def decode_seconds(self, sequences: Number, context: Number, prompts: Number) -> Number:
        """One query of each of `sequences`, which hold `context` tokens in all, beside so many tokens of prompts."""
        read = self.full_layers * context
        if self.windowed_layers:
            read = read + self.windowed_layers * np.minimum(context, sequences * float(self.window))
        if self.mixed_token_s == self.token_s:
            return read * self.token_s
        return read * np.where(np.asarray(prompts) > 0, self.mixed_token_s, self.token_s)


def attention_cost(model: ModelSpec, pricer: Pricer, tp: int, kv: KVPrecision, first: int, end: int) -> AttentionCost:
    """Attention of layers `first` to `end` (exclusive)."""
    windowed = max(0, end - max(first, model.first_windowed_layer)) if model.sliding_window else 0
    return AttentionCost(
        full_layers=end - first - windowed,
        windowed_layers=windowed,
        window=model.sliding_window or 0,
        pair_s=_pair_seconds(model, pricer, tp),
        token_s=_token_seconds(model, pricer, tp, kv, mixed=False),
        mixed_token_s=_token_seconds(model, pricer, tp, kv, mixed=True),
    )


def _pair_seconds(model: ModelSpec, pricer: Pricer, tp: int) -> float:
    """Two products of head_dim per head; without a fused kernel over seen and unseen keys alike, and three kernels
    (scores, softmax, values) that write or read every score in 16 bits, softmax doing both."""
    head_dim = model.attention_width / model.num_heads
    if pricer.probed is not None:
        return 4 * model.attention_width / tp / pricer.probed.attention_flop_per_s
    if pricer.device.timings is not None:
        return _probed_pair_seconds(model, pricer, tp, head_dim)
    softmax = COMPUTE.generations[pricer.device.generation].flash_head_dim
    rate = pricer.attention_flop_per_s * head_dim / (head_dim + softmax)
    products = 4 * model.attention_width / tp / rate
    if pricer.engine.fused_attention:
        return products
    return 2 * (products + 4 * 2 * model.num_heads / tp / pricer.stream)


def _probed_pair_seconds(model: ModelSpec, pricer: Pricer, tp: int, head_dim: float) -> float:
    """At the rate of a prompt of a usual length."""
    length = 512
    seconds = attention_seconds(
        pricer.device,
        batch=1,
        heads=model.num_heads / tp,
        kv_heads=kv_heads_per_rank(model, tp),
        queries=length,
        keys=length,
        head_dim=head_dim,
        precision=pricer.wide,
    )
    return float(seconds) / (length * (length + 1) / 2)


def _token_seconds(model: ModelSpec, pricer: Pricer, tp: int, kv: KVPrecision, *, mixed: bool) -> float:
    """Reads from memory, or, where the kernel does not share them among query heads, from the cache."""
    per_token = kv_bytes(model, tp, kv)
    if pricer.probed is not None:
        return per_token / pricer.probed.kv_bytes_per_s
    from_memory = per_token / (pricer.stream * pricer.constants.kv_gain)
    group = model.num_heads // model.num_kv_heads
    shared = pricer.engine.grouped_heads
    alone = mixed and pricer.device_kind in pricer.engine.groups_apart
    if (shared is None or group in shared) and not alone:
        return from_memory
    return max(from_memory, per_token * group / (pricer.stream * pricer.constants.cache_gain))


def kv_bytes(model: ModelSpec, tp: int, kv: KVPrecision) -> float:
    """Bytes of one token's keys and values in one layer on one rank; a latent (arXiv 2405.04434) is on every rank."""
    element = BYTES_PER_ELEMENT[kv]
    if model.latent:
        return (model.latent.kv_rank + model.latent.rope_dim) * element
    return 2 * float(kv_heads_per_rank(model, tp)) * model.head_dim * element
