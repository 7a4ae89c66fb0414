"""What the blocks, messages and the update of a layout each take when nothing else happens.

The step's price is made of these by closed forms; a rehearsal puts them together by running them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.collectives import CollectiveKind
from triaxial.plan.cost.operators import Size
from triaxial.plan.cost.placement import Placement, place
from triaxial.plan.cost.practice import OURS
from triaxial.plan.layout import Layout
from triaxial.plan.layout_table import layout_table
from triaxial.plan.pipeline.generators import stage_placement
from triaxial.plan.pipeline.stages import rank_loads, stage_cut
from triaxial.plan.training.block_seconds import model_seconds, price_blocks
from triaxial.plan.training.constants import TRAINING
from triaxial.plan.training.hops import hops_of, tied_seconds
from triaxial.plan.training.memory import data_ep, rank_weights
from triaxial.plan.training.price import Estimate
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]
_COMPUTE, _TP = 0, 1
"""Parts of `BlockSeconds.table`."""


@dataclass(frozen=True)
class Alone:
    """Seconds of everything that a step is made of, on one rank. Blocks are embedding, layers and head."""

    cut: tuple[int, ...]
    """Blocks of each virtual stage."""
    compute_s: Floats
    """[phase, block] of one micro-batch: forward, input gradient (with recomputation), weight gradient."""
    tp_s: Floats
    """[phase, block]: its tensor-parallel collectives."""
    hop_s: float
    """Of one stage's output, or its gradient, to the next rank, across the outermost links between any two."""
    reduce_s: Floats
    """[block]: of one reduction of its gradients over the data-parallel ranks, or over those that ZeRO shards over."""
    tied_s: float
    """Of exchanging the gradient of a table that both ends of the pipeline hold, if they are on two ranks."""
    slowed_s: float
    """What computation loses in a step to the data-parallel messages beside it."""
    update_s: float
    """Of the optimizer and what else a program does once a step."""


def price_alone(model: ModelSpec, cluster: Cluster, training: Training, layout: Layout, whole: Estimate) -> Alone:
    """Price a legal layout's parts; `whole` is the layout's estimate."""
    table = layout_table([layout])
    placement = place(cluster, table)
    seconds = model_seconds(price_blocks(model, training, OURS, table, placement), table.recompute, OURS, TRAINING)
    count = model.num_layers + 2
    blocks = rank_loads((1,) * count, count, "1f1b", model.num_dense_layers)  # as if each were on a rank of its own
    parts = seconds.on_rank(blocks).table
    replicated, routed = rank_weights(model, table.tp, data_ep(table), blocks)
    gradient_bytes = (replicated + routed) * OURS.reduce_bytes
    reduction: tuple[str, CollectiveKind] = ("shard", "reduce_scatter") if layout.zero else ("data", "all_reduce")
    return Alone(
        cut=layout.cut or stage_cut(model, training.seq_len, stage_placement(layout.schedule, layout.pp, layout.vpp)),
        compute_s=parts[:, _COMPUTE],
        tp_s=parts[:, _TP],
        hop_s=float(hops_of(model, training, table, placement).farthest[0]),
        reduce_s=np.array([_seconds(placement, *reduction, size) for size in gradient_bytes]),
        tied_s=float(tied_seconds(model, OURS, table, placement)[0]),
        slowed_s=TRAINING.on(cluster.device).interference * whole.hidden_s["dp"],
        update_s=whole.time_s["optimizer"] + whole.time_s["data"],
    )


def _seconds(placement: Placement, span: str, kind: CollectiveKind, num_bytes: Size) -> float:
    return float(placement.seconds(span, kind, np.atleast_1d(num_bytes))[0])
