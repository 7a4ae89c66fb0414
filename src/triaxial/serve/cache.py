"""The paged KV cache of one rank: keys and values of its layers, in blocks that the front gives out."""

from __future__ import annotations

import torch
from torch import Tensor


class PagedCache:
    """Keys and values [layer, block * block_tokens + offset, kv head, dim].

    Pages that no token has been written to take no memory on a CPU: the zeros that they are made of come from the
    kernel at the first write. They are zeros because masked keys still enter a product.
    """

    def __init__(
        self, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int, *, home: int, like: Tensor
    ) -> None:
        """`home`: blocks that lie in order at each slot's place (`blocks.BlockPool`)."""
        self.block_tokens, self.home = block_tokens, home
        shape = (layers, blocks * block_tokens, kv_heads, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [tokens, kv heads, dim] of one layer at `places` [tokens]."""
        self.keys[layer].index_copy_(0, places, k)
        self.values[layer].index_copy_(0, places, v)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of these blocks [n]: keys and values [n * block_tokens, kv heads, dim]."""
        size = self.block_tokens
        return _gather(self.keys[layer], blocks, size), _gather(self.values[layer], blocks, size)

    def at_home(self, layer: int, slots: slice, tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of neighbouring slots' homes, where they lie: each [slots, tokens, kv heads, dim]."""
        stride = self.home * self.block_tokens
        return _homes(self.keys[layer], stride)[slots, :tokens], _homes(self.values[layer], stride)[slots, :tokens]


def _homes(cached: Tensor, stride: int) -> Tensor:
    return cached[: len(cached) // stride * stride].view(-1, stride, *cached.shape[1:])


def block_bytes(layers: int, block_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block on a rank with so many layers and kv heads."""
    return 2 * layers * block_tokens * kv_heads * head_dim * dtype.itemsize


def _gather(cached: Tensor, blocks: Tensor, block_tokens: int) -> Tensor:
    return cached.view(-1, block_tokens, *cached.shape[1:]).index_select(0, blocks).flatten(0, 1)
