"""The fused kernels against float64, and their fp32 and bf16 against each other's rounding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triaxial.kernels.operations import BLOCK_TOKENS, HEAD_DIMS, Kernels, kernels_for

TYPES = [torch.float32, torch.bfloat16]
HALF_UNIT = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
"""Relative error of one number that is computed in fp32 and rounded to the type, sums of some hundred included."""


@pytest.fixture(params=TYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def kernels(dtype: torch.dtype) -> Kernels:
    return needed(dtype)


def needed(dtype: torch.dtype) -> Kernels:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = kernels_for(torch.empty(0, dtype=dtype))
    torch.set_num_threads(threads)
    if found is None:
        pytest.skip("this processor has no AVX-512, or there was no compiler at installation")
    return found


def check(found: Tensor, expected: Tensor) -> None:
    tolerance = HALF_UNIT[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (70, 1024)])
def test_rms_norm(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = draw(*shape, dtype=dtype, scale=3), draw(shape[1], dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    check(kernels.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_of_a_view(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = draw(5, 8, 33, dtype=dtype)[:, 2:5], draw(33, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    check(kernels.rms_norm(x, weight, 1e-5), expected)


def test_add(kernels: Kernels, dtype: torch.dtype) -> None:
    x, y = draw(3, 37, dtype=dtype), draw(3, 37, dtype=dtype)
    expected = x.double() + y.double()
    assert kernels.add(x, y) is y
    check(y, expected)


@pytest.mark.parametrize("width", [1, 19, 1408])
def test_gate(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x = draw(6, 2 * width, dtype=dtype, scale=20)  # far into both tails of the exponential
    gate, up = x.double().chunk(2, dim=-1)
    check(kernels.gate(x), gate * gate.sigmoid() * up)


def test_gate_passes_on_what_is_not_a_number(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 40] = math.nan
    assert kernels.gate(x).isnan().tolist() == [[i == 8 for i in range(32)]]


@pytest.mark.parametrize("half", [3, 5, 32])
def test_rotate(kernels: Kernels, dtype: torch.dtype, half: int) -> None:
    qkv = draw(7, 6, 2 * half, dtype=dtype)
    cos, sin = draw(7, half, dtype=dtype), draw(7, half, dtype=dtype)
    a, b = qkv[:, 1:4].double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    check(kernels.rotate(qkv[:, 1:4], cos, sin), torch.cat((a * c - b * s, b * c + a * s), -1))


def test_store(kernels: Kernels, dtype: torch.dtype) -> None:
    cached, qkv, places = torch.zeros(3, 20, 10, dtype=dtype), draw(4, 7, 10, dtype=dtype), torch.tensor([9, 0, 19, 4])
    kernels.store(cached, places, qkv[:, 2:5])
    expected = torch.zeros_like(cached)
    expected[:, places] = qkv[:, 2:5].transpose(0, 1)
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_decode_reads_blocks_where_they_lie(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    """Sequences that end at, before and after a block's end, some with a window, two kv heads for six query heads."""
    first, stop = torch.tensor([0, 0, 3, 17, 0, 31]), torch.tensor([1, 16, 33, 48, 45, 32])
    blocks = torch.randperm(20)[: 6 * 3].view(6, 3)
    keys, values = (draw(2, 20 * BLOCK_TOKENS, dim, dtype=dtype, scale=2) for _ in range(2))
    q = draw(6, 6, dim, dtype=dtype)

    def alone(i: int) -> Tensor:
        places = (blocks[i, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()[first[i] : stop[i]]
        k, v = (x[:, places].double().repeat_interleave(3, 0) for x in (keys, values))
        shares = ((k @ q[i].double()[..., None]).squeeze(-1) / dim**0.5).softmax(-1)
        return (shares[:, None] @ v).squeeze(1)

    found = kernels.decode(q, keys, values, blocks, first, stop)
    check(found, torch.stack([alone(i) for i in range(6)]))


def test_hidden_keys_do_not_count_whatever_they_hold(kernels: Kernels, dtype: torch.dtype) -> None:
    """Blocks are used again, and nobody clears them."""
    keys, values = torch.full((2, 1, 32, 32), math.nan, dtype=dtype)
    keys[:, 5:20], values[:, 5:20] = draw(1, 15, 32, dtype=dtype), 2.5
    q, blocks = draw(1, 1, 32, dtype=dtype), torch.tensor([[0, 1]])
    found = kernels.decode(q, keys, values, blocks, torch.tensor([5]), torch.tensor([20]))
    check(found, torch.full((1, 1, 32), 2.5, dtype=torch.float64))


def test_there_are_none_for_other_types() -> None:
    assert kernels_for(torch.empty(0, dtype=torch.float16)) is None
    assert kernels_for(torch.empty(0, dtype=torch.float64)) is None


@pytest.mark.parametrize(("out", "into"), [(32, 32), (96, 320), (64, 1408)])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 64, 531])
def test_product(rows: int, out: int, into: int) -> None:
    weight, x = torch.randn(out, into).bfloat16(), torch.randn(rows, into).bfloat16()
    kernels = needed(torch.bfloat16)
    packed = kernels.pack(weight)
    if packed is None:
        pytest.skip("this processor has no AMX")
    found, expected = kernels.product(x, packed), x.double() @ weight.double().t()
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5 * into**0.5)


def test_matrices_of_odd_sizes_are_not_packed() -> None:
    kernels = needed(torch.bfloat16)
    assert kernels.pack(torch.zeros(48, 64, dtype=torch.bfloat16)) is None
    assert kernels.pack(torch.zeros(64, 40, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("rows", "tokens", "window"),
    [
        (1, 1, None),
        (15, 15, None),
        (16, 16, 3),
        (33, 33, 16),
        (257, 257, None),
        (1, 40, 7),
        (20, 100, 50),
        (17, 64, None),
    ],
)
def test_prompt(rows: int, tokens: int, window: int | None, dim: int) -> None:
    """The last rows of six query heads over two kv heads, which lie side by side as a projection leaves them."""
    kernels = needed(torch.bfloat16)
    if not kernels.can_prompt(dim):
        pytest.skip("this processor has no AMX")
    q, k, v = draw(tokens, 10, dim, dtype=torch.bfloat16, scale=2).split([6, 2, 2], dim=1)
    q = q[-rows:].contiguous()
    distance = torch.arange(tokens - rows, tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < (window or tokens))
    wide = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
    # shares are rounded to bf16 before they weigh the values: an error of half a unit of each
    torch.testing.assert_close(kernels.prompt(q, k, v, window).double(), expected, rtol=2**-7, atol=2**-6)
