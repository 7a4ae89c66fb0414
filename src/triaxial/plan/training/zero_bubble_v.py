"""What the closed form of ZB-V misses, found by playing the schedule: for the few layouts that a search ends with."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.layout_table import SCHEDULES, Ints
from triaxial.plan.pipeline.schedule import Durations, build_schedule
from triaxial.plan.pipeline.simulate import StageCosts, simulate
from triaxial.plan.training.pipeline_seconds import StageSeconds, bubble_seconds

Floats = NDArray[np.float64]

MOST_OPTIMISTIC = 1.1
"""The closed form of ZB-V is never too long, and short by less than this factor."""
PLAYED_RANKS = 16
"""A longer pipeline is played as one of so many ranks, with micro-batches in proportion: right to about a hundredth."""


def is_optimistic(schedule: Ints, pp: Ints, micro_batches: Ints) -> NDArray[np.bool_]:
    """Where the closed form may be short by more than a per cent: ZB-V with less than two micro-batches a rank."""
    result: NDArray[np.bool_] = (schedule == SCHEDULES.index("zb-v")) & (pp > 1) & (micro_batches < 2 * pp)
    return result


def excess_seconds(schedule: Ints, pp: Ints, micro_batches: Ints, rank: StageSeconds) -> Floats:
    """Seconds that the played schedule takes beyond `bubble_seconds`, for ranks that all take as long.

    Args:
        rank: seconds of one micro-batch on the average rank.
    """
    excess = np.zeros(len(schedule))
    for row in np.flatnonzero(is_optimistic(schedule, pp, micro_batches)):
        scale = max(1.0, pp[row] / PLAYED_RANKS)
        forward, input_grad, weight_grad = (
            float(seconds[row]) for seconds in (rank.forward, rank.input_grad, rank.weight_grad)
        )
        share = _excess(
            round(pp[row] / scale),
            max(1, round(micro_batches[row] / scale)),
            round(input_grad / forward, 2),
            round(weight_grad / forward, 2),
        )
        excess[row] = share * scale * forward
    return excess


@lru_cache(maxsize=4096)
def _excess(ranks: int, micro_batches: int, input_grad: float, weight_grad: float) -> float:
    """In forward passes of a rank, of which the two gradients are multiples."""
    seconds = [np.array([value]) for value in (1.0, input_grad, weight_grad)]
    own, others = StageSeconds(*seconds), StageSeconds(*(value * (ranks - 1) for value in seconds))
    schedule, pp, vpp, count = (np.array([value]) for value in (SCHEDULES.index("zb-v"), ranks, 2, micro_batches))
    closed = own.total * micro_batches + bubble_seconds(schedule, pp, vpp, count, own, others)
    stage = Durations(0.5, input_grad / 2, weight_grad / 2)
    table = build_schedule("zb-v", ranks=ranks, micro_batches=micro_batches, virtual_stages=2, durations=stage)
    played = simulate(table, StageCosts.uniform(2 * ranks, stage)).step_time_s
    return max(0.0, played - float(closed[0]))
