"""The paged KV cache of one rank: keys and values of its layers, in blocks that the front gives out."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from triaxial.kernels.operations import BLOCK_TOKENS, HEAD_DIMS, Kernels


class PagedCache:
    """Keys and values [layer, kv head, block * block_tokens + offset, dim]: attention reads one head after the other.

    All zeros at first, because masked keys still enter a product.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        *,
        home: int,
        like: Tensor,
        kernels: Kernels | None,
    ) -> None:
        """`home`: blocks that lie in order at each slot's place (`blocks.BlockPool`)."""
        self.block_tokens, self.home, self.kernels = block_tokens, home, kernels
        shape = (layers, kv_heads, blocks * block_tokens, head_dim)
        keys, values = _zeros(shape, like), _zeros(shape, like)
        self._layers = [*zip(keys, values, strict=True)]
        self._homes = [(self._cut(k), self._cut(v)) for k, v in self._layers]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [tokens, kv heads, dim] of one layer at `places` [tokens]."""
        for cached, x in zip(self._layers[layer], (k, v), strict=True):
            if self.kernels:
                self.kernels.store(cached, places, x)
            else:
                cached.index_copy_(1, places, x.transpose(0, 1))

    @property
    def can_decode(self) -> bool:
        """Whether `decode` can read it."""
        shape = self._layers[0][0].shape if self._layers else (0,)
        return self.kernels is not None and shape[-1] in HEAD_DIMS and self.block_tokens == BLOCK_TOKENS

    def decode(self, layer: int, q: Tensor, blocks: Tensor, first: Tensor, stop: Tensor) -> Tensor:
        """Attention of one row of each sequence q [sequences, heads, dim]; see `Kernels.decode`."""
        assert self.kernels is not None
        return self.kernels.decode(q, *self._layers[layer], blocks, first, stop)

    def gather(self, layer: int, blocks: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """Copies of these blocks, equally many of each sequence: each [sequences, kv heads, tokens, dim]."""
        keys, values = self._layers[layer]
        return self._gather(keys, blocks, sequences), self._gather(values, blocks, sequences)

    def at_home(self, layer: int, slots: slice, tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of neighbouring slots' homes, where they lie: each [slots, kv heads, tokens, dim]."""
        keys, values = self._homes[layer]
        return keys[slots, :, :tokens], values[slots, :, :tokens]

    def _gather(self, cached: Tensor, blocks: Tensor, sequences: int) -> Tensor:
        heads, _, dim = cached.shape
        copied = cached.view(heads, -1, self.block_tokens, dim).index_select(1, blocks)
        return copied.view(heads, sequences, -1, dim).transpose(0, 1)

    def _cut(self, cached: Tensor) -> Tensor:
        """Into homes: [slots, kv heads, tokens of a home, dim]."""
        tokens = max(self.home, 1) * self.block_tokens
        heads, total, dim = cached.shape
        return cached[:, : total // tokens * tokens].view(heads, -1, tokens, dim).transpose(0, 1)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """On a CPU memory from the kernel, in large pages, which become real when they are first written to.

    `torch.zeros` writes them all.
    """
    if like.device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    # private, because shared memory has large pages only where an administrator says so
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def block_bytes(layers: int, block_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block on a rank with so many layers and kv heads."""
    return 2 * layers * block_tokens * kv_heads * head_dim * dtype.itemsize
