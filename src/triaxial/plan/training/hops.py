"""Seconds of what passes between the stages of a pipeline: every hop by the tier of links that it crosses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.placement import Placement
from triaxial.plan.cost.practice import Practice
from triaxial.plan.layout_table import SCHEDULES, Ints, LayoutTable
from triaxial.plan.training.block_seconds import shard_of
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Hops:
    """Seconds of one micro-batch's output, or its gradient, on its way from stage to stage, one entry per layout."""

    chain: Floats
    """From the first pipeline rank to the last."""
    farthest: Floats
    """The hop that crosses the outermost links; so does the one from the last rank back to the first."""
    loops: Floats
    """[tier, layout]: what 1F1B waits for in its steady state, per micro-batch. n ranks in a row have n micro-batches
    that go there and back between them; the slowest of these loops begins and ends with hops across one tier."""
    ranks_inside: Floats
    """[tier, layout]: ranks on this side of the first hop across the tier."""

    def way(self, vpp: Ints) -> Floats:
        """Through all virtual stages, from the last rank to the first in between."""
        return self.chain * vpp + self.farthest * (vpp - 1)

    def mean(self, pp: Ints, vpp: Ints) -> Floats:
        """Of one hop on that way."""
        mean: Floats = self.way(vpp) / np.maximum(pp * vpp - 1, 1)
        return mean

    def steady(self, micro_batches: Ints) -> Floats:
        """Added to a step of 1F1B beside filling and draining."""
        waits: Floats = (np.maximum(micro_batches - self.ranks_inside, 0) * self.loops).max(axis=0)
        return waits


def hops_of(model: ModelSpec, training: Training, table: LayoutTable, placement: Placement) -> Hops:
    """Price the hops of every layout."""
    hop, members = tier_seconds(model, training, table, placement), placement.members("pp").astype(float)
    inside = np.vstack([np.ones(len(table)), members[:-1]])  # ranks under one unit of the tier below
    count = np.ceil(table.pp / inside) - np.ceil(table.pp / members)  # hops that cross each tier
    loops = np.zeros_like(hop)
    for tier, first in enumerate(inside):
        units = np.ceil(table.pp / first)
        within = np.ceil(first / inside[:tier]) - np.ceil(first / members[:tier])  # hops inside one of them
        between = (count[tier:] * hop[tier:]).sum(axis=0) + (units - 2) * (within * hop[:tier]).sum(axis=0)
        loop = 2 * between / np.maximum((units - 2) * first + 2, 1)
        loops[tier] = np.where(count[tier] > 0, np.maximum(loop, hop[tier]), 0.0)
    outermost = np.where(count > 0, np.arange(len(count))[:, None], 0).max(axis=0)
    return Hops((count * hop).sum(axis=0), hop[outermost, np.arange(len(table))], loops, inside)


def tier_seconds(model: ModelSpec, training: Training, table: LayoutTable, placement: Placement) -> Floats:
    """Seconds of a hop that crosses the links of each tier and none beyond: [tier, layout].

    Where any hop goes from node to node each tp rank sends its part, and the receivers gather them (arXiv 2104.04473,
    section 4.1); sequence parallelism has it in parts already.
    """
    output = np.asarray(shard_of(table).tokens(training.seq_len) * model.hidden * training.element_bytes)
    in_parts = (table.sp > 0) | (placement.in_node("tp") & ~placement.in_node("pp"))
    gathered = placement.seconds("tp", "all_gather", np.where(in_parts & (table.sp == 0), output, 0.0))
    sent = placement.message_seconds("pp", output / np.where(in_parts, table.tp, 1))
    return np.where(sent > 0, sent + gathered, 0.0)


def tied_seconds(model: ModelSpec, practice: Practice, table: LayoutTable, placement: Placement) -> Floats:
    """The first and the last stage exchange the gradient of the table that they share; ZB-V has both on one rank."""
    apart = model.tied_embeddings & (table.schedule != SCHEDULES.index("zb-v"))
    shared = model.vocab * model.hidden / table.tp * practice.reduce_bytes * apart
    return 2 * placement.seconds("pp", "send_recv", shared)
