"""Where to cut a stack of blocks into pipeline stages: the exact balanced cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from triaxial import BadInput

Floats = npt.NDArray[np.float64]


def balanced_cut(
    costs: Sequence[float],
    stages: int,
    memory: Sequence[float] | Sequence[Sequence[float]] | None = None,
    memory_limit: float | None = None,
) -> tuple[int, ...]:
    """Cut blocks into contiguous stages so that the slowest stage is as fast as can be. Exact.

    Of the cuts with an equally slow slowest stage, the one with the most even rest (least sum of squares) is taken;
    of those, the one whose later stages hold more blocks, because earlier stages hold more activations in flight.

    Args:
        costs: seconds of each block, in order (embedding and head are blocks too).
        stages: number of stages; each gets at least one block.
        memory: bytes of each block, or one such row per stage where a block weighs more on an early stage.
        memory_limit: bytes that one stage may hold.

    Returns:
        The number of blocks of each stage.

    Raises:
        BadInput: more stages than blocks, negative costs, or no cut that respects the memory limit.
    """
    blocks = len(costs)
    if not 1 <= stages <= blocks:
        raise BadInput(f"cannot cut {blocks} blocks into {stages} stages: use 1 to {blocks} stages")
    if min(costs) < 0:
        raise BadInput(f"block {int(np.argmin(costs))} has a negative cost of {min(costs)}")
    seconds = np.broadcast_to(_span_sums(np.asarray(costs, float)), (stages, blocks + 1, blocks + 1))
    if memory is not None and memory_limit is not None:
        bytes_per_stage = np.broadcast_to(np.asarray(memory, float), (stages, blocks))
        fits = np.stack([_span_sums(row) <= memory_limit for row in bytes_per_stage])
        seconds = np.where(fits, seconds, np.inf)

    slowest, _ = _best_cut(seconds, np.maximum)
    if not np.isfinite(slowest):
        raise BadInput(f"no cut of {blocks} blocks into {stages} stages keeps each within {memory_limit:g} bytes")
    tolerance = 1e-12 * slowest  # the same blocks summed in another order differ in the last bits
    _, cut = _best_cut(np.where(seconds <= slowest + tolerance, seconds**2, np.inf), np.add)
    return cut


def placed_cut(num_layers: int, embedding: float, head: float, placement: Sequence[int]) -> tuple[int, ...]:
    """Cut equal layers between an embedding and a head so that the slowest rank is as fast as can be. Exact.

    A rank with several virtual stages is as slow as their sum, which the slowest stage says little about: on a V the
    head and the embedding share a rank. Layers that are all alike can be shared out as one likes, so each goes to the
    rank, and there to the stage, that has least (the later of equals). Where `balanced_cut` has no slower rank, its evener stages are taken.

    Args:
        num_layers: layers, each at a cost of 1.
        embedding: cost in layers of the first block.
        head: cost in layers of the last block.
        placement: the rank of each virtual stage.

    Raises:
        BadInput: more stages than blocks.
    """
    even = _even_stages(num_layers, embedding, head, len(placement))
    stages = len(placement)
    if stages == max(placement) + 1:  # stages are ranks
        return even
    ends = np.zeros(stages)
    ends[0], ends[-1] = embedding, head
    layers = np.ones(stages)
    layers[0] = layers[-1] = 0  # they hold a block already
    homes = np.asarray(placement)
    for _ in range(num_layers - stages + 2):
        loads = np.bincount(homes, ends + layers).astype(float)
        here = np.flatnonzero(homes == _last_least(loads))
        layers[here[_last_least((ends + layers)[here])]] += 1
    blocks = layers.astype(int)
    blocks[[0, -1]] += 1
    base = np.asarray(even, float)
    base[[0, -1]] -= 1
    if np.bincount(homes, ends + base).max() <= np.bincount(homes, ends + layers).max() + 1e-9:
        return even
    return tuple(blocks.tolist())


@lru_cache(maxsize=4096)
def _even_stages(num_layers: int, embedding: float, head: float, stages: int) -> tuple[int, ...]:
    return balanced_cut([embedding, *(1.0,) * num_layers, head], stages)


def _last_least(values: Floats) -> int:
    return len(values) - 1 - int(values[::-1].argmin())


def _span_sums(values: Floats) -> Floats:
    """[first, end]: sum over blocks first..end-1; infinite where that holds no block."""
    prefix = np.concatenate(([0.0], np.cumsum(values)))
    sums = prefix[None, :] - prefix[:, None]
    sums[np.tril_indices(len(prefix))] = np.inf
    return sums


def _best_cut(price: Floats, combine: np.ufunc) -> tuple[float, tuple[int, ...]]:
    """Dynamic programming over the stages: least `combine` of `price[stage, first, end]` and the cut that has it."""
    best = price[0, 0]  # [end]: best price of the blocks before `end` in the stages so far
    firsts = []
    for stage in range(1, len(price)):
        through = combine(best[:, None], price[stage])  # [first, end]
        firsts.append(through.argmin(axis=0))
        best = through.min(axis=0)
    ends = [len(best) - 1]
    for first in reversed(firsts):
        ends.append(int(first[ends[-1]]))
    bounds = [0, *reversed(ends)]
    return float(best[-1]), tuple(end - first for first, end in pairwise(bounds))
