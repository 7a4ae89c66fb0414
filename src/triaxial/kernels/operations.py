"""The kernels of a decoder, over torch's tensors."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from triaxial.kernels.library import NUMBER, POINTER, SUFFIXES, declared, library

BLOCK_TOKENS = 16
"""Tokens of a block of the cache that `decode` reads."""
HEAD_DIMS = (32, 64, 96, 128, 256)
"""That `decode` takes."""

_SIGNATURES = {
    "rms_norm": (POINTER, POINTER, POINTER, NUMBER, NUMBER, ctypes.c_float),
    "add": (POINTER, POINTER, NUMBER),
    "gate": (POINTER, POINTER, NUMBER, NUMBER),
    "rotate": (POINTER, POINTER, POINTER, POINTER, NUMBER, NUMBER, NUMBER, NUMBER),
    "store": (POINTER, POINTER, POINTER, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER),
    "prompt": (*[POINTER] * 4, *[NUMBER] * 10),
    "product": (POINTER, POINTER, POINTER, NUMBER, NUMBER, NUMBER),
    **{f"decode{dim}": (*[POINTER] * 7, *[NUMBER] * 5) for dim in HEAD_DIMS},
}


def kernels_for(like: Tensor) -> Kernels | None:
    """The kernels for tensors of this device and type, if there are any."""
    found = library()
    if found is None or like.device.type != "cpu" or like.dtype not in SUFFIXES or torch.get_num_threads() > 1:
        return None
    return _kernels(like.dtype)


@cache
def _kernels(dtype: torch.dtype) -> Kernels:
    found = library()
    assert found is not None
    return Kernels(found, SUFFIXES[dtype])


@cache
def _have_tiles() -> bool:
    found = library()
    return found is not None and torch.cpu._is_amx_tile_supported() and bool(found.allow_tiles())


class Kernels:
    """All tensors are of one type, and contiguous where nothing else is said."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        there = {name: getattr(library, f"{name}_{suffix}", None) for name in _SIGNATURES}
        self._functions = {name: declared(f, *_SIGNATURES[name]) for name, f in there.items() if f is not None}

    def pack(self, weight: Tensor) -> Tensor | None:
        """A matrix [out, in] in the order in which `product` reads it: 3 dimensions; None if it can't be."""
        out, into = weight.shape
        if weight.dtype != torch.bfloat16 or out % 32 or into % 32 or not _have_tiles():
            return None
        return weight.view(out // 16, 16, into // 2, 2).transpose(1, 2).reshape(out // 16, into // 32, 512)

    def product(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [rows, in] times the transpose of the matrix [out, in] that was packed -> [rows, out]."""
        x = x.contiguous()
        rows, into, out = x.shape[0], x.shape[1], packed.shape[0] * 16
        y = torch.empty((rows, out), dtype=x.dtype)
        self._functions["product"](y.data_ptr(), x.data_ptr(), packed.data_ptr(), rows, out, into)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Over the last dimension of x [..., width]."""
        x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        width = x.shape[-1]
        self._functions["rms_norm"](y.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps)
        return y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in y's place."""
        self._functions["add"](y.data_ptr(), x.data_ptr(), y.numel())
        return y

    def gate(self, x: Tensor) -> Tensor:
        """silu(gate) * up of x [tokens, 2 * width], which holds them side by side -> [tokens, width]."""
        tokens, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(tokens, width)
        self._functions["gate"](y.data_ptr(), x.data_ptr(), tokens, width)
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding by halves of x [tokens, heads, dim], rows anywhere; cos and sin [tokens, dim / 2]."""
        tokens, heads, dim = x.shape
        y = torch.empty((tokens, heads, dim), dtype=x.dtype)
        self._functions["rotate"](
            y.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim // 2, x.stride(0)
        )
        return y

    def store(self, cached: Tensor, places: Tensor, x: Tensor) -> None:
        """Put x [tokens, heads, dim], rows anywhere, at `places` [tokens] of cached [heads, room, dim]."""
        tokens, heads, dim = x.shape
        room = cached.shape[1]
        self._functions["store"](
            cached.data_ptr(), x.data_ptr(), places.data_ptr(), tokens, heads, dim, room, x.stride(0)
        )

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first: Tensor, stop: Tensor) -> Tensor:
        """Attention of q [sequences, heads, dim] over keys and values [kv heads, room, dim] -> as q.

        Sequence i has blocks[i] [sequences, width] and sees its keys from first[i] up to stop[i] (int64, like blocks).
        """
        y = torch.empty(q.shape, dtype=q.dtype)
        sequences, heads, dim = q.shape
        kv_heads, room, _ = keys.shape
        pointers = (tensor.data_ptr() for tensor in (y, q, keys, values, blocks, first, stop))
        self._functions[f"decode{dim}"](*pointers, sequences, blocks.shape[1], heads, kv_heads, room)
        return y

    def can_prompt(self, dim: int) -> bool:
        """Whether `prompt` takes heads of this size."""
        return "prompt" in self._functions and dim % 32 == 0 and _have_tiles()

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention of q [rows, heads, dim], the last of k and v's [tokens, kv heads, dim], wherever these lie.

        With a window a row sees so many keys up to its own.
        """
        y = torch.empty(q.shape, dtype=q.dtype)
        (rows, heads, dim), (tokens, kv_heads, _) = q.shape, k.shape
        pointers = (tensor.data_ptr() for tensor in (y, q, k, v))
        strides = (*k.stride()[:2], *v.stride()[:2])
        self._functions["prompt"](*pointers, rows, tokens, window or tokens, heads, kv_heads, dim, *strides)
        return y
