"""The decoder's operations for inference: those of `parallel.tensor` without what only a backward pass needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triaxial.kernels.operations import Kernels, kernels_for
from triaxial.model.decoder import Rotation
from triaxial.parallel.mesh import Axis
from triaxial.parallel.tensor import TensorParallel

_ROWS = 64
"""That a norm takes at a time on a CPU: what it makes in between stays in the cache, which halves its time."""


class Inference(TensorParallel):
    """Runs under `torch.inference_mode`; shapes as in `TensorParallel`, never sequence-parallel."""

    def __init__(self, axis: Axis, kernels: Kernels | None) -> None:
        super().__init__(axis)
        self._rms_norm, self._gate = (kernels.rms_norm, kernels.gate) if kernels else (rms_norm, gate)
        self._add: Callable[[Tensor, Tensor], Tensor] = kernels.add if kernels else torch.add

    def norm_column(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(self._rms_norm(x, norm, eps), weight, bias)

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Tensor:
        y = self.axis.all_reduce(linear(self._gate(x) if gated else x, weight, None))
        return y if bias is None else y.add_(bias)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._add(x, y)

    def head_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x, weight, eps)

    def embed(self, ids: Tensor, weight: Tensor, first_row: int) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(ids, weight)
        local = ids - first_row
        absent = (local < 0) | (local >= weight.shape[0])
        return self.axis.all_reduce(F.embedding(local.masked_fill_(absent, 0), weight).masked_fill_(absent[:, None], 0))


@dataclass(frozen=True)
class WideRotation(Rotation):
    """A rotation in a third of the operations, by cos and sin of every number in a head [seq, 1, heads, dim]."""

    @staticmethod
    def of(rotation: Rotation, heads: int) -> WideRotation:
        """For up to so many heads."""
        cos, sin = torch.cat((rotation.cos, rotation.cos), -1), torch.cat((-rotation.sin, rotation.sin), -1)
        return WideRotation(cos.repeat(1, 1, heads, 1), sin.repeat(1, 1, heads, 1))

    def apply(self, x: Tensor) -> Tensor:
        heads, half = x.shape[2], x.shape[3] // 2
        return torch.addcmul(x * self.cos[:, :, :heads], x.roll(half, -1), self.sin[:, :, :heads])


@dataclass(frozen=True)
class FusedRotation(Rotation):
    """A rotation in one operation."""

    kernels: Kernels

    def apply(self, x: Tensor) -> Tensor:
        return self.kernels.rotate(x[:, 0], self.cos, self.sin)[:, None]


def inference_rotation(rotation: Rotation, kernels: Kernels | None, heads: int) -> Rotation:
    """The quickest way to the same, for up to so many heads."""
    return FusedRotation(rotation.cos, rotation.sin, kernels) if kernels else WideRotation.of(rotation, heads)


def pack(weight: Tensor) -> Tensor:
    """A matrix in the order in which `linear` reads it fastest: in bf16 on a CPU by the kernels, or else by oneDNN."""
    kernels = kernels_for(weight)
    tiles = kernels.pack(weight) if kernels else None
    if tiles is not None:
        return tiles
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in] times the transpose of a matrix [out, in] that may be packed, and a bias [out]."""
    if weight.ndim == 3:
        kernels = kernels_for(x)
        assert kernels is not None
        product = kernels.product(x, weight)
        return product if bias is None else product.add_(bias)
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """For a prompt on a CPU half the time of `F.rms_norm`, which takes more passes."""
    y = torch.empty_like(x)
    if len(x) <= _ROWS or x.device.type != "cpu":
        return _norm_into(y, x, weight, eps)
    parts = -(-len(x) // _ROWS)
    for part, normed in zip(x.chunk(parts), y.chunk(parts), strict=True):
        _norm_into(normed, part, weight, eps)
    return y


def _norm_into(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.mul(wide * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_(), weight, out=y)


def gate(x: Tensor) -> Tensor:
    """silu(gate) * up of x [tokens, 2 * width], which holds them side by side -> [tokens, width]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
