"""What data parallelism costs a step: gradients reduced, parameters gathered, and how much of it hides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.cost.collectives import CollectiveKind
from triaxial.plan.cost.placement import Placement
from triaxial.plan.cost.practice import Practice
from triaxial.plan.layout_table import LayoutTable
from triaxial.plan.training.constants import TrainingConstants
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]


def data_parallel_seconds(
    training: Training,
    practice: Practice,
    constants: TrainingConstants,
    table: LayoutTable,
    placement: Placement,
    *,
    weights: Floats,
    layers: Floats,
    forward: Floats,
    backward: Floats,
) -> tuple[Floats, Floats]:
    """Seconds per step that data-parallel communication adds on one rank, and those that hide behind computation.

    Without ZeRO one all-reduce a step; ZeRO-1 a reduce-scatter and an all-gather a step; ZeRO-2 a reduce-scatter a
    micro-batch; ZeRO-3 also gathers each layer before its forward and its backward pass, every micro-batch
    (arXiv 1910.02054, 2304.11277). Hybrid sharding adds an all-reduce of each shard over its replicas, once a step.

    Args:
        weights: parameters on the rank.
        layers: decoder layers on the rank: the first piece sent, or the last, has nothing to hide behind.
        forward: seconds of one micro-batch's forward pass on the rank.
        backward: seconds of its backward pass.
    """
    zero = table.zero
    # what runs beside computation goes layer by layer, the rest as one message
    pieces = np.maximum(layers * practice.messages_per_layer, 1)
    by_layer = np.where((zero >= 3) | practice.overlap_gradients, pieces, 1)

    def seconds(span: str, kind: CollectiveKind, num_bytes: Floats) -> Floats:
        return by_layer * placement.seconds(span, kind, num_bytes / by_layer)

    gradient_bytes, parameter_bytes = weights * practice.reduce_bytes, weights * training.element_bytes
    all_reduce = seconds("data", "all_reduce", gradient_bytes)
    scatter = seconds("shard", "reduce_scatter", gradient_bytes)
    replicas = seconds("replicas", "all_reduce", gradient_bytes / table.state_shards)
    gather = seconds("shard", "all_gather", parameter_bytes)
    micro_batches = np.where(zero >= 2, table.micro_batches(training.global_batch), 1)
    gathers = np.where(zero >= 3, micro_batches, np.where(zero >= 1, 1, 0))
    reduce = np.where(zero == 0, all_reduce, scatter) + np.where(zero >= 3, gather, 0)
    replicas = np.where(zero > 0, replicas, 0.0)

    share = np.where(placement.in_node("data"), constants.overlap_share, constants.overlap_between_nodes)

    def hidden(seconds: Floats, window: Floats, overlapped: bool) -> Floats:
        return np.minimum(seconds, share * window) if overlapped else np.zeros_like(seconds)

    # the last of the layers has nothing to hide behind, a shard starts for its replicas when the next layer is reduced
    all_but_one, all_but_two = (np.maximum(1 - exposed / np.maximum(layers, 1), 0) for exposed in (1, 2))
    beside, last = reduce * all_but_one, reduce * all_but_one + replicas * all_but_two
    hides = gathers * hidden(gather * all_but_one, forward, practice.overlap_parameters)
    hides = hides + (micro_batches - 1) * hidden(beside, backward, practice.overlap_gradients)
    hides = hides + hidden(last, backward, practice.overlap_gradients)
    total = micro_batches * reduce + replicas + gathers * gather
    return total - (1 - constants.interference) * hides, hides
