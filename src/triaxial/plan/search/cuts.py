"""Where each layout's stages begin: at another block than FLOP would have it, if that gains something."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.placement import place
from triaxial.plan.cost.practice import OURS
from triaxial.plan.layout_table import SCHEDULES, Ints, LayoutTable, distinct
from triaxial.plan.pipeline.generators import stage_placement
from triaxial.plan.pipeline.stages import Loads, cut_around, heaviest_ranks, stage_cut
from triaxial.plan.training.block_seconds import ModelSeconds, model_seconds, price_blocks
from triaxial.plan.training.constants import TRAINING
from triaxial.plan.training.price import fits, memory_of
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]

LEAST_GAIN = 0.001
"""Share of the slowest rank's time below which a cut of its own is not worth its words."""


def block_seconds(seconds: ModelSeconds) -> Floats:
    """Seconds of a layer without experts, one with experts, the embedding and the head: [block, layout]."""
    dense = seconds.dense_layer.total
    expert = seconds.expert_layer.total if seconds.expert_layer else np.zeros_like(dense)
    return np.stack([dense, expert, seconds.embedding.total, seconds.head.total])


def cut_loads(
    model: ModelSpec, cluster: Cluster, training: Training, table: LayoutTable, blocks: Floats
) -> tuple[Loads, NDArray[np.bool_]]:
    """What the heaviest ranks of each layout hold, and whether by a cut of its own.

    A layout gets one if ranks balanced by its seconds, not by FLOP, have a faster slowest rank and fit.

    Args:
        blocks: what `block_seconds` gives for the layouts.
    """
    count = table.micro_batches(training.global_batch)
    loads = heaviest_ranks(model, training.seq_len, table, count)
    ends = _ends(model, table, blocks)
    gains = np.zeros(len(table), dtype=bool)
    rows = np.flatnonzero(_differ(model, training, table, ends))
    if len(rows) == 0:
        return loads, gains
    rest, seconds = table.take(rows), blocks[:, rows]
    own = heaviest_ranks(model, training.seq_len, rest, count[rows], ends[:, rows])
    faster = _slowest(own, seconds) < (1 - LEAST_GAIN) * _slowest(loads.take(rows), seconds)
    better = faster & fits(cluster, memory_of(model, training, OURS, rest, own).on(cluster.device).peak)
    gains[rows[better]] = True
    return loads.replaced(rows[better], own.take(np.flatnonzero(better))), gains


def with_cuts(model: ModelSpec, cluster: Cluster, training: Training, table: LayoutTable) -> LayoutTable:
    """The same layouts with such cuts written out."""
    priced = price_blocks(model, training, OURS, table, place(cluster, table))
    blocks = block_seconds(model_seconds(priced, table.recompute, OURS, TRAINING))
    _, gains = cut_loads(model, cluster, training, table, blocks)
    cuts: list[tuple[int, ...]] = [()] * len(table)
    for row in np.flatnonzero(gains):
        placement = stage_placement(SCHEDULES[table.schedule[row]], int(table.pp[row]), int(table.vpp[row]))
        embedding, head = _ends(model, table, blocks)[:, row].tolist()
        cuts[row] = cut_around(model.num_layers, embedding, head, placement)
    return replace(table, cuts=tuple(cuts))


def _ends(model: ModelSpec, table: LayoutTable, blocks: Floats) -> Ints:
    """What embedding and head take beside the layers of an average rank, in per cent: [end, layout]. Rounded, so that
    layouts share few cuts."""
    layers = model.num_dense_layers * blocks[0] + (model.num_layers - model.num_dense_layers) * blocks[1]
    ends: Ints = np.rint(100 * blocks[2:] * table.pp / layers).astype(np.int64)
    return ends


def _differ(model: ModelSpec, training: Training, table: LayoutTable, ends: Ints) -> NDArray[np.bool_]:
    """Where ranks balanced by seconds are not those balanced by FLOP."""
    first, which = distinct(table.pp, table.vpp, table.schedule, *ends)
    differ = []
    for row, (embedding, head) in zip(first, ends[:, first].T.tolist()):
        placement = stage_placement(SCHEDULES[table.schedule[row]], int(table.pp[row]), int(table.vpp[row]))
        by_seconds = cut_around(model.num_layers, embedding, head, placement)
        differ.append(by_seconds != stage_cut(model, training.seq_len, placement))
    return np.array(differ)[which]


def _slowest(loads: Loads, blocks: Floats) -> Floats:
    held = np.stack([loads.dense_layers, loads.expert_layers, loads.embedding, loads.head])
    slowest: Floats = np.einsum("bcl,bl->cl", held, blocks).max(axis=0)
    return slowest
