"""Reduce-scatter between hosts: every rank gets its part of the sum, with several under way at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.world import World
from triaxial.parallel.mesh import Axis

WORLD_SIZE = 3


def reduce_two(rank: int, dtype: torch.dtype) -> list[list[list[float]]]:
    """Parts of [6, 2] whose rows count up from a number of the rank's own, and of twice that."""
    axis = Axis("dp", tuple(range(WORLD_SIZE)), rank, dist.group.WORLD)
    x = torch.arange(12, dtype=dtype).view(6, 2) + 100 * rank
    pending = [axis.reduce_scatter_async(x), axis.reduce_scatter_async(2 * x)]
    parts = [one.wait().tolist() for one in reversed(pending)][::-1]
    assert axis.traffic["reduce_scatter"] == 2 * x.numel() * x.element_size()
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_gets_its_part_of_each_sum(world: World, dtype: torch.dtype) -> None:
    total = 3 * torch.arange(12, dtype=dtype).view(6, 2) + 300
    for rank, (once, twice) in enumerate(world.run(WORLD_SIZE, reduce_two, dtype)):
        mine = total[2 * rank : 2 * rank + 2]
        assert once == mine.tolist()
        assert twice == (2 * mine).tolist()
