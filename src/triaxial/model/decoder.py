"""The decoder: one set of blocks for Llama, Mistral, Qwen2 and Qwen3, ignorant of how it is spread.

A model is a list of blocks: embedding, layers, head. Activations between blocks are [tokens, hidden] with tokens
ordered sequence-major (token = position * batch + sample). What is cut over ranks happens in the operations object
that each block is given; the parameters are this rank's slices (see `model.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from triaxial.model.spec import Llama3Rope, ModelSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [seq, batch, heads, dim], k, v [seq, batch, kv_heads, dim]) -> [seq, batch, heads, dim]."""


class Operations(Protocol):
    """What a block asks of the tensor-parallel axis; shapes in `parallel.tensor.TensorParallel`."""

    def norm_column(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Tensor: ...
    def add(self, x: Tensor, y: Tensor) -> Tensor: ...
    def head_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def embed(self, ids: Tensor, weight: Tensor, first_row: int) -> Tensor: ...
    def cross_entropy(self, logits: Tensor, labels: Tensor, first_row: int, vocab: int) -> Tensor: ...


Parameters = dict[str, Tensor]
"""A block's local parameters by their short names."""


@dataclass(frozen=True)
class Embedding:
    """ids [tokens] -> [tokens, hidden]."""

    parameters: Parameters
    ops: Operations
    first_row: int

    def __call__(self, ids: Tensor) -> Tensor:
        return self.ops.embed(ids, self.parameters["embedding"], self.first_row)


@dataclass(frozen=True)
class Layer:
    """Attention and MLP with their residuals: [tokens, hidden] -> [tokens, hidden]."""

    parameters: Parameters
    ops: Operations
    spec: ModelSpec
    index: int
    kv_heads: int
    """kv heads that this rank holds."""

    def __call__(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        p, ops, eps = self.parameters, self.ops, self.spec.norm_eps
        qkv = ops.norm_column(x, p["attention_norm"], eps, p["qkv"], p.get("qkv_bias"))
        q, k, v = self._heads(qkv, rotation)
        attended = attend(q, k, v).flatten(0, 1).flatten(1)  # [tokens, heads * dim]
        x = ops.add(x, ops.row(attended, p["out"], p.get("out_bias")))
        gate_up = ops.norm_column(x, p["mlp_norm"], eps, p["gate_up"], p.get("gate_up_bias"))
        return ops.add(x, ops.row(gate_up, p["down"], p.get("down_bias"), gated=True))

    def _heads(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Split the fused projection [tokens, (heads + 2 kv) * dim] and rotate q and k."""
        spec, seq = self.spec, rotation.cos.shape[0]
        heads = qkv.view(seq, -1, qkv.shape[1] // spec.head_dim, spec.head_dim)
        q, k, v = heads.split([heads.shape[2] - 2 * self.kv_heads, self.kv_heads, self.kv_heads], dim=2)
        if spec.qk_norm:
            q = self.ops.head_norm(q, self.parameters["q_norm"], spec.norm_eps)
            k = self.ops.head_norm(k, self.parameters["k_norm"], spec.norm_eps)
        return rotation.apply(q), rotation.apply(k), v


@dataclass(frozen=True)
class Head:
    """Final norm and output projection: [tokens, hidden] -> this rank's logits [tokens, vocab/tp]."""

    parameters: Parameters
    ops: Operations
    spec: ModelSpec
    first_row: int

    def __call__(self, x: Tensor) -> Tensor:
        p = self.parameters
        return self.ops.norm_column(x, p["final_norm"], self.spec.norm_eps, p["head"], None)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies over valid labels [tokens]."""
        return self.ops.cross_entropy(self(x), labels, self.first_row, self.spec.vocab)


Block = Embedding | Layer | Head


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding (arXiv 2104.09864) as the Hugging Face models apply it: halves, not pairs."""

    cos: Tensor  # [seq, 1, 1, dim / 2]
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate [seq, batch, heads, dim]."""
        rotated: Tensor = _Rotate.apply(x, self.cos, self.sin)
        return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None  # a rotation's transpose turns the other way


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return y


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Angle per position of each pair of dimensions [head_dim / 2], scaled as the model asks."""
    frequencies = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if not isinstance(scaling, Llama3Rope):
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = smooth.clamp(0, 1)  # 0: long wavelengths, divided by the factor; 1: short ones, unchanged
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def build_rotation(spec: ModelSpec, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Tables for positions [seq]; angles are computed in fp32 (fp64 for an fp64 model's tables is not HF's way)."""
    angles = positions.float()[:, None] * inverse_frequencies(spec).to(positions.device)[None, :]
    shape = (positions.shape[0], 1, 1, spec.head_dim // 2)
    return Rotation(angles.cos().to(dtype).view(shape), angles.sin().to(dtype).view(shape))


def causal_attention(spec: ModelSpec, layer: int) -> Attend:
    """Self-attention of whole sequences, within the layer's sliding window if it has one."""
    windowed = spec.sliding_window is not None and layer >= spec.first_windowed_layer

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq = q.shape[0]
        mask = None
        if windowed and spec.sliding_window is not None and spec.sliding_window < seq:
            i = torch.arange(seq, device=q.device)
            distance = i[:, None] - i[None, :]
            mask = (distance >= 0) & (distance < spec.sliding_window)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [batch, heads, seq, dim]
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return y.permute(2, 0, 1, 3)

    return attend


def run_blocks(blocks: Sequence[Block], ids: Tensor, spec: ModelSpec) -> Tensor:
    """Logits [tokens, vocab/tp] of whole sequences ids [seq, batch]: the plain loop over all blocks."""
    dtype = next(iter(blocks[0].parameters.values())).dtype
    rotation = build_rotation(spec, torch.arange(ids.shape[0], device=ids.device), dtype)
    x = ids.flatten()
    for block in blocks:
        x = block(x, rotation, causal_attention(spec, block.index)) if isinstance(block, Layer) else block(x)
    return x
