"""Attention of decoding sequences over the cache, against each one's own keys alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triaxial.kernels.operations import Kernels, kernels_for
from triaxial.model.spec import load_model_spec
from triaxial.serve.attention import StepAttention, attention
from triaxial.serve.cache import PagedCache
from triaxial.serve.wire import StepArrays

BLOCK, HOME, HEADS, KV_HEADS, DIM, WINDOW = 4, 64, 4, 2, 8, 21
LIKE = torch.empty(0, dtype=torch.float64)
SPEC = load_model_spec("tiny-byte").model_copy(update={"sliding_window": WINDOW, "first_windowed_layer": 1})


def decoding(slots: list[int], lengths: list[int]) -> StepArrays:
    """A step in which each sequence, so long with its new token, sits at its slot's home."""
    n, most = len(slots), -(-max(lengths) // BLOCK)
    return StepArrays(
        number=0,
        slots=np.array(slots),
        first=np.array(lengths) - 1,
        counts=np.ones(n, np.int64),
        sample=np.ones(n, bool),
        score=np.zeros(n, bool),
        base=np.zeros(n, np.int64),
        tables=np.array(slots)[:, None] * HOME + np.arange(most),
        tokens=np.zeros(n, np.int64),
        states=[],
    )


@pytest.mark.parametrize("layer", [0, 1], ids=["full", "windowed"])
@pytest.mark.parametrize(
    ("slots", "lengths"),
    [([0, 1, 2], [200, 201, 199]), ([2, 0, 3], [9, 250, 130]), ([4], [77]), ([1, 3], [1, 256])],
    ids=["alike", "unlike", "alone", "first token"],
)
def test_each_sequence_sees_its_own_keys(slots: list[int], lengths: list[int], layer: int) -> None:
    cache = PagedCache(2, 5 * HOME, BLOCK, KV_HEADS, DIM, home=HOME, like=LIKE, kernels=None)
    k, v = torch.randn(2, 5 * HOME * BLOCK, KV_HEADS, DIM, dtype=LIKE.dtype)
    cache.write(layer, torch.arange(len(k)), k, v)
    q = torch.randn(len(slots), HEADS, DIM, dtype=LIKE.dtype)
    places = torch.tensor([slot * HOME * BLOCK + length - 1 for slot, length in zip(slots, lengths, strict=True)])

    attend = StepAttention(SPEC, cache, decoding(slots, lengths), LIKE).attend(layer, layer)
    found = attend(q[:, None], k[places][:, None], v[places][:, None]).squeeze(1)

    def alone(row: int) -> Tensor:
        start = slots[row] * HOME * BLOCK
        first = max(0, lengths[row] - WINDOW) if layer else 0
        mine = slice(start + first, start + lengths[row])
        keys, values = (x[mine].transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
        scores = (keys @ q[row, :, :, None]).squeeze(-1) / DIM**0.5
        return (scores.softmax(-1)[:, None] @ values).squeeze(1)

    torch.testing.assert_close(found, torch.stack([alone(row) for row in range(len(slots))]), rtol=1e-12, atol=1e-12)


def test_one_query_of_many_keys_is_not_causal() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    whole = attention(q, k, v, None, causal=True)
    last = attention(q[:, :, -1:], k, v, None, causal=False)
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[:, :, :1], v[:, :, :1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True), last)


@pytest.mark.parametrize("layer", [0, 1], ids=["full", "windowed"])
def test_kernels_see_what_torch_sees(layer: int) -> None:
    """Two decoding sequences and chunks of two prompts, one from its beginning on: blocks lie in any order."""
    torch.set_num_threads(1)
    like, dim, held, counts = torch.empty(0, dtype=torch.bfloat16), 32, [40, 17, 0, 30], [1, 1, 35, 20]
    kernels = kernels_for(like)
    if kernels is None:
        pytest.skip("no kernels for this processor")
    spec = SPEC.model_copy(update={"head_dim": dim})
    n, rows = len(held), sum(counts)
    step = StepArrays(
        number=0,
        slots=np.arange(n),
        first=np.array(held),
        counts=np.array(counts),
        sample=np.ones(n, bool),
        score=np.zeros(n, bool),
        base=np.zeros(n, np.int64),
        tables=np.random.default_rng(0).permutation(16).reshape(n, 4),
        tokens=np.zeros(rows, np.int64),
        states=[],
    )
    cached = torch.randn(2, 256, KV_HEADS, dim).bfloat16()
    q, k, v = torch.randn(rows, 1, HEADS + 2 * KV_HEADS, dim).bfloat16().split([HEADS, KV_HEADS, KV_HEADS], dim=2)

    def attended(found: Kernels | None) -> Tensor:
        cache = PagedCache(2, 16, 16, KV_HEADS, dim, home=4, like=like, kernels=found)
        cache.write(layer, torch.arange(256), *cached)
        return StepAttention(spec, cache, step, like).attend(layer, layer)(q.contiguous(), k, v)

    torch.testing.assert_close(attended(kernels), attended(None), rtol=2**-6, atol=2**-6)
