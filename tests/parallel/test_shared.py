"""Collectives through shared memory: the same whether or not the rank is in inference mode, in either order."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from tests.world import World
from triaxial.parallel.mesh import Axis
from triaxial.parallel.shared import SharedMemory


def reduce_in_both_modes(rank: int, world_size: int) -> list[list[float]]:
    axis = Axis("tp", tuple(range(world_size)), rank, dist.group.WORLD)
    axis.shared = SharedMemory(dist.group.WORLD, axis.ranks, rank, None)
    sums = []
    for turn in range(6):
        with torch.inference_mode() if turn % 4 < 2 else nullcontext():
            sums.append(axis.all_reduce(torch.tensor([1.0, 10.0]) * (rank + turn)).tolist())
    return sums


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_in_and_out_of_inference_mode(world: World, world_size: int) -> None:
    for sums in world.run(world_size, reduce_in_both_modes, world_size):
        expected = [sum(rank + turn for rank in range(world_size)) for turn in range(6)]
        assert sums == [[total, 10 * total] for total in expected]
