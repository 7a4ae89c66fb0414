"""The pipeline of ranks that take turns on their processors: what one leaves idle while it waits, others use.

The micro-batches in flight are the customers of a closed queueing network: they queue for the processors, then travel
from stage to stage. Its throughput follows by mean value analysis (Reiser and Lavenberg, "Mean-value analysis of closed
multichain queuing networks", JACM 27 (1980)); that one stage cannot use all processors by itself counts as travel
(Seidmann, Schweitzer and Shalev-Oren, "Computerized closed queueing network models", Large Scale Systems 12 (1987)).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.layout_table import SCHEDULES, Ints, LayoutTable

Floats = NDArray[np.float64]


def shared_waiting_seconds(
    ranks_per_processor: float, table: LayoutTable, micro_batches: Ints, stage: Floats, chain: Floats, hop: Floats
) -> tuple[Floats, Floats]:
    """Seconds of a step that the slowest rank waits: because nothing can be computed, and for messages besides.

    Args:
        stage, chain: as in `shared_pipeline_seconds`.
        hop: seconds of a message between neighbouring stages.
    """
    travel = 2 * (table.pp * table.vpp - 1) * hop
    at_once, step = (
        shared_pipeline_seconds(ranks_per_processor, table.schedule, table.pp, micro_batches, stage, chain, seconds)
        for seconds in (np.zeros_like(travel), travel)
    )
    # however many they are, the last micro-batch's way back through the stages has nothing left beside it
    return np.maximum(0.0, at_once - stage * micro_batches), np.maximum(step - at_once, travel / 2)


def shared_pipeline_seconds(
    ranks_per_processor: float,
    schedule: Ints,
    pp: Ints,
    micro_batches: Ints,
    stage: Floats,
    chain: Floats,
    travel: Floats,
) -> Floats:
    """Seconds from the first action of a step to the last.

    Args:
        schedule: positions in `SCHEDULES`.
        stage: seconds of a micro-batch on the slowest stage while all ranks are at work.
        chain: the same of all stages, added up.
        travel: seconds of its hops, there and back.
    """
    alone = np.maximum(stage, chain / ranks_per_processor)
    delay = alone - stage + travel
    in_flight = np.where(schedule == SCHEDULES.index("gpipe"), micro_batches, np.minimum(micro_batches, pp))
    queued, cycle = np.zeros_like(stage), np.zeros_like(stage)
    for customers in range(1, int(in_flight.max()) + 1):
        response = stage * (1 + queued)
        queued = customers * response / (response + delay)
        cycle = np.where(customers <= in_flight, (response + delay) / customers, cycle)
    return micro_batches * cycle
