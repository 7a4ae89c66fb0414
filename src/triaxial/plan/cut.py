"""Where to cut a stack of blocks into pipeline stages: the exact balanced cut."""

from __future__ import annotations

from collections.abc import Sequence
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
