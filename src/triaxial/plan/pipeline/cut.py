"""Where to cut a stack of blocks into pipeline stages: the cut whose slowest rank is fastest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heapreplace
from math import ceil

from triaxial import BadInput


def placed_cut(num_layers: int, embedding: float, head: float, placement: Sequence[int]) -> tuple[int, ...]:
    """Cut equal layers between an embedding and a head so that the slowest rank is as fast as can be. Exact.

    A rank with several virtual stages is as slow as their sum, which the slowest stage says little about: on a V the
    head and the embedding share a rank. Where stages as even as can be make no rank slower, they are taken.

    Args:
        num_layers: layers, each at a cost of 1.
        embedding: cost in layers of the first block.
        head: cost in layers of the last block.
        placement: the rank of each virtual stage.

    Returns:
        The number of blocks (embedding, layers, head) of each virtual stage.

    Raises:
        BadInput: more stages than blocks.
    """
    stages = len(placement)
    if not 1 <= stages <= num_layers + 2:
        raise BadInput(f"cannot cut {num_layers + 2} blocks into {stages} stages: use 1 to {num_layers + 2} stages")
    if stages == 1:
        return (num_layers + 2,)
    ends = [embedding, *(0.0,) * (stages - 2), head]
    held = [0, *(1,) * (stages - 2), 0]  # a stage that holds no end needs a layer
    loads = tuple(end + layers for end, layers in zip(ends, held))
    more = even = _share_out(num_layers - sum(held), loads)
    if max(placement) + 1 < stages:
        by_rank = _share_out_by_rank(num_layers - sum(held), loads, placement)
        more = even if _slowest(even, loads, placement) <= _slowest(by_rank, loads, placement) + 1e-9 else by_rank
    first, *inner, last = (own + layers for own, layers in zip(held, more))
    return (first + 1, *inner, last + 1)


@lru_cache(maxsize=4096)
def _share_out(layers: int, loads: tuple[float, ...]) -> tuple[int, ...]:
    """How many of so many layers each gets when every layer goes to the one that has least: layers are all alike, so
    nothing is more even. Of equals the later one gets it, because earlier stages hold more activations in flight."""
    # before that each gets its fair share, but for what the fullest has more than the emptiest
    at_once = max(0, layers // len(loads) - ceil(max(loads) - min(loads)))
    shares = [at_once] * len(loads)
    heap = [(load + at_once, -index) for index, load in enumerate(loads)]
    heapify(heap)
    for _ in range(layers - sum(shares)):
        load, index = heap[0]
        heapreplace(heap, (load + 1, index))
        shares[-index] += 1
    return tuple(shares)


def _share_out_by_rank(layers: int, loads: Sequence[float], placement: Sequence[int]) -> tuple[int, ...]:
    """The same to ranks first, then on each rank to its stages."""
    own: list[list[int]] = [[] for _ in range(max(placement) + 1)]
    for stage, rank in enumerate(placement):
        own[rank].append(stage)
    shares = [0] * len(loads)
    of_ranks = _share_out(layers, tuple(sum(loads[stage] for stage in stages) for stages in own))
    for count, stages in zip(of_ranks, own):
        for stage, share in zip(stages, _share_out(count, tuple(loads[stage] for stage in stages))):
            shares[stage] = share
    return tuple(shares)


def _slowest(shares: Sequence[int], loads: Sequence[float], placement: Sequence[int]) -> float:
    ranks = [0.0] * (max(placement) + 1)
    for share, load, rank in zip(shares, loads, placement):
        ranks[rank] += share + load
    return max(ranks)
