"""How long a pipeline takes beyond its slowest rank's own work: closed forms, for many layouts at once.

`plan/pipeline/simulate.py` plays the real table; these forms are what it gives for stages of equal cost, and tests hold the
two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.layout_table import SCHEDULES, Ints
from triaxial.plan.training.hops import Hops

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one micro-batch: forward, input gradient (with recomputation) and weight gradient."""

    forward: Floats
    input_grad: Floats
    weight_grad: Floats

    @property
    def total(self) -> Floats:
        return self.forward + self.input_grad + self.weight_grad

    def __sub__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(
            self.forward - other.forward,
            self.input_grad - other.input_grad,
            self.weight_grad - other.weight_grad,
        )


def bubble_seconds(
    schedule: Ints,
    pp: Ints,
    vpp: Ints,
    micro_batches: Ints,
    own: StageSeconds,
    others: StageSeconds,
    staggered: bool = False,
) -> Floats:
    """Idle seconds of the slowest rank while the pipeline fills and drains.

    Args:
        schedule: positions in `SCHEDULES`.
        vpp: virtual stages per rank.
        own: seconds of the slowest rank.
        others: seconds of all ranks but the slowest, added up.
        staggered: a rank begins its next step while others still finish this one.

    Sources: GPipe and 1F1B (p-1) (F+B+W), interleaved 1/v of it (arXiv 2104.04473, section 2.2); ZB-H1 (p-1) (F+B-W)
    and ZB-H2 (p-1) (F+B-2W) (arXiv 2401.10241, table 1), as far as there are micro-batches whose W can fill: all but
    the last; but unless staggered no less than the last rank waits for its first input, (p-1) F. ZB-V starts and
    ends on one rank, and waits for half of the longer of F and B (arXiv 2405.15362, section 3.3), or for the way of
    the first micro-batch there and back while the others follow at the pace of the longer of F and B.
    """
    chain = others.forward + others.input_grad
    first_input = 0.0 if staggered else others.forward
    one_weight = others.weight_grad / np.maximum(pp - 1, 1)
    longer = np.maximum(own.forward, own.input_grad)
    there_and_back = chain + own.forward + own.input_grad + (micro_batches - 1) * longer + own.weight_grad / 2
    forms = {
        "interleaved": others.total / vpp,
        "zb-h1": np.maximum(chain - one_weight * np.minimum(micro_batches - 1, pp - 1), others.forward),
        "zb-h2": np.maximum(chain - one_weight * np.minimum(micro_batches - 1, 2 * (pp - 1)), first_input),
        "zb-v": np.maximum(
            np.maximum(others.forward, others.input_grad) / 2, there_and_back - micro_batches * own.total
        ),
    }
    kinds = [schedule == SCHEDULES.index(name) for name in forms]
    return np.select(kinds, list(forms.values()), others.total)


def transfer_seconds(
    schedule: Ints, vpp: Ints, micro_batches: Ints, hops: Hops, overlapped: bool, staggered: bool = False
) -> Floats:
    """Seconds that stage-to-stage transfers add to a step.

    Filling and draining waits for hops in every schedule, 1F1B for each micro-batch besides. Schedules with more
    micro-batches in flight hide their transfers behind computation, if the program lets them.

    Args:
        overlapped: a rank computes while it sends; if not, interleaved stages pay for every hop.
        staggered: as in `bubble_seconds`.
    """
    there_and_back = 2 * hops.chain
    steady = hops.steady(micro_batches)
    forms = {
        "gpipe": there_and_back,
        "1f1b": there_and_back + steady,
        "interleaved": 2 * hops.way(vpp) if overlapped else there_and_back + steady * vpp,
        "zb-h1": 2 * there_and_back,
        "zb-h2": there_and_back if staggered else hops.chain,
        "zb-v": 2 * there_and_back,
    }
    return np.select([schedule == SCHEDULES.index(name) for name in forms], list(forms.values()))
