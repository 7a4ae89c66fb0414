"""The paged cache gives back what was written, and takes memory only for that."""

from __future__ import annotations

import psutil
import torch

from triaxial.serve.cache import PagedCache, block_bytes

LIKE = torch.empty(0, dtype=torch.bfloat16)


def test_keys_and_values_are_read_as_they_were_written() -> None:
    cache = PagedCache(2, 7, 4, 3, 8, home=3, like=LIKE, kernels=None)  # two homes of 12 tokens, and a block of neither
    k, v = torch.randn(2, 28, 3, 8).bfloat16()
    places = torch.randperm(28)
    cache.write(1, places, k[places], v[places])

    keys, values = cache.at_home(1, slice(0, 2), 9)
    for found, written in ((keys, k), (values, v)):
        assert torch.equal(found, written[:24].view(2, 12, 3, 8)[:, :9].transpose(1, 2))
    keys, values = cache.gather(1, torch.tensor([6, 2, 0, 5]), 2)
    for found, written in ((keys, k), (values, v)):
        blocks = written.view(7, 4, 3, 8)[[6, 2, 0, 5]]
        assert torch.equal(found, blocks.view(2, 8, 3, 8).transpose(1, 2))
    assert not any(x.any() for x in cache.at_home(0, slice(0, 2), 12))


def test_only_what_is_written_takes_memory() -> None:
    process = psutil.Process()
    before, blocks = process.memory_info().rss, 1 << 14
    cache = PagedCache(2, blocks, 16, 4, 64, home=blocks // 8, like=LIKE, kernels=None)
    assert blocks * block_bytes(2, 16, 4, 64, LIKE.dtype) == 512 << 20
    cache.write(0, torch.arange(16), *torch.ones(2, 16, 4, 64).bfloat16())
    assert process.memory_info().rss - before < 64 << 20
