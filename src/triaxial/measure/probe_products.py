"""Matrix products and attention as training runs them: on tensors that are in no cache, into memory of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from triaxial.cluster.timings import AttentionTiming, GemmTiming
from triaxial.measure.stopwatch import Stopwatch
from triaxial.model.decoder import causal_attention
from triaxial.model.spec import load_model_spec

_MODEL_LAYERS = 8
_OUT_OF_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of [out, into] for so many tokens."""

    tokens: int
    out: int
    into: int


@dataclass(frozen=True)
class AttentionShape:
    """Causal self-attention with half as many kv heads as query heads."""

    sequences: int
    heads: int
    length: int
    head_dim: int


LINEARS = tuple(
    LinearShape(tokens, out, into)
    for out, into in (
        (64, 64),
        (192, 64),
        (256, 256),
        (768, 256),
        (256, 1024),
        (1024, 256),
        (1024, 1024),
        (3072, 1024),
        (1024, 4096),
    )
    for tokens in (1, 8, 64, 256, 1024)
)
"""As models have them, small and skinny ones too."""
ATTENTIONS = (
    AttentionShape(1, 4, 64, 32),
    AttentionShape(4, 4, 64, 32),
    AttentionShape(2, 4, 128, 64),
    AttentionShape(8, 4, 128, 64),
    AttentionShape(1, 4, 512, 64),
    AttentionShape(4, 4, 512, 64),
    AttentionShape(1, 4, 1024, 64),
    AttentionShape(1, 4, 512, 128),
)


def gemm_timings(watch: Stopwatch, dtype: torch.dtype, shapes: Iterable[LinearShape]) -> Iterator[GemmTiming]:
    """The three products of every linear layer."""
    for shape in shapes:
        layers = cycle(_linears(shape, dtype, watch.device))
        products = (
            (_Linear.forward, (shape.tokens, shape.out, shape.into)),
            (_Linear.input_gradient, (shape.tokens, shape.into, shape.out)),
            (_Linear.weight_gradient, (shape.into, shape.out, shape.tokens)),
        )
        for product, (m, n, k) in products:
            seconds = watch.seconds(lambda product=product, layers=layers: product(next(layers)))  # type: ignore[misc]
            yield GemmTiming(m=m, n=n, k=k, seconds=seconds)


@dataclass
class _Linear:
    """One layer of a model, whose turn comes after all others'."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    total: Tensor
    """Of its weight gradients."""
    made: Tensor | None = None
    """Its last result: held, as training holds it, so that the next one is written to other memory."""

    def forward(self) -> None:
        self.made = F.linear(self.x, self.weight)

    def input_gradient(self) -> None:
        self.made = self.dy @ self.weight

    def weight_gradient(self) -> None:
        self.total.addmm_(self.dy.t(), self.x)


def _linears(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> list[_Linear]:
    """As many as a small model has, or as caches do not hold."""
    tokens, out, into = shape.tokens, shape.out, shape.into
    num_bytes = 2 * (tokens * (out + into) + out * into) * dtype.itemsize
    full = partial(torch.full, fill_value=0.01, dtype=dtype, device=device)
    return [
        _Linear(full((tokens, into)), full((out, into)), full((tokens, out)), full((out, into)))
        for _ in range(min(_MODEL_LAYERS, max(2, _OUT_OF_CACHE_BYTES // num_bytes)))
    ]


def attention_timings(
    watch: Stopwatch, dtype: torch.dtype, shapes: Iterable[AttentionShape]
) -> Iterator[AttentionTiming]:
    """The decoder's attention core forward and backward."""
    attend = causal_attention(load_model_spec("tiny-byte"), layer=0)
    for shape in shapes:
        heads, kv_heads = shape.heads, shape.heads // 2
        q, k, v = (
            torch.randn(shape.length, shape.sequences, count, shape.head_dim, dtype=dtype, device=watch.device)
            for count in (heads, kv_heads, kv_heads)
        )
        inputs = tuple(x.requires_grad_() for x in (q, k, v))
        y = attend(*inputs)
        differentiate = partial(torch.autograd.grad, y, inputs, torch.randn_like(y), retain_graph=True)
        yield AttentionTiming(
            sequences=shape.sequences,
            heads=heads,
            kv_heads=kv_heads,
            length=shape.length,
            head_dim=shape.head_dim,
            forward_s=watch.seconds(partial(attend, *inputs)),
            backward_s=watch.seconds(differentiate),
        )
