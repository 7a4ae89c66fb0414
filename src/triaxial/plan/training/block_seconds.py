"""Seconds of the model's three kinds of block for every layout: priced once per distinct shard, then looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.blocks import dense_layer, embedding, expert_layer, head
from triaxial.plan.cost.operators import Block, Shard
from triaxial.plan.cost.placement import Placement
from triaxial.plan.cost.practice import Practice
from triaxial.plan.cost.pricing import PhaseSeconds, Seconds, price_block
from triaxial.plan.layout_table import RECOMPUTES, LayoutTable, distinct
from triaxial.plan.pipeline.stages import Loads
from triaxial.plan.training.constants import TrainingConstants
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of one block, or of all that a rank holds, and one micro-batch."""

    table: Floats
    """[phase, part, layout]: forward, input gradient (with recomputation), weight gradient; and of each computation,
    then exposed communication on the tp, cp and ep axes."""
    hidden: Floats
    """[phase, part, layout]: communication on the tp and cp axes that runs beside the computation."""

    @property
    def phases(self) -> Floats:
        """[phase, layout]"""
        total: Floats = self.table.sum(axis=1)
        return total

    @property
    def total(self) -> Floats:
        """[layout]"""
        total: Floats = self.table.sum(axis=(0, 1))
        return total

    def __add__(self, other: BlockSeconds) -> BlockSeconds:
        return BlockSeconds(self.table + other.table, self.hidden + other.hidden)

    def times(self, count: Floats) -> BlockSeconds:
        return BlockSeconds(self.table * count, self.hidden * count)


@dataclass(frozen=True)
class ModelSeconds:
    """Blocks of one model in every layout."""

    dense_layer: BlockSeconds
    expert_layer: BlockSeconds | None
    """None in a model without experts."""
    embedding: BlockSeconds
    head: BlockSeconds

    def on_rank(self, rank: Loads) -> BlockSeconds:
        """Seconds of one micro-batch of all that ranks hold."""
        held = (
            self.dense_layer.times(rank.dense_layers)
            + self.embedding.times(rank.embedding)
            + self.head.times(rank.head)
        )
        return held + self.expert_layer.times(rank.expert_layers) if self.expert_layer else held

    def total_on_rank(self, rank: Loads) -> Floats:
        """Seconds of one micro-batch in all; `rank` may hold several candidates per layout."""
        total: Floats = (
            rank.dense_layers * self.dense_layer.total
            + rank.embedding * self.embedding.total
            + rank.head * self.head.total
        )
        if self.expert_layer:
            total = total + rank.expert_layers * self.expert_layer.total
        return total


@dataclass(frozen=True)
class PricedBlocks:
    """Operators' seconds of each kind of block, per distinct shard: what neither recomputation nor
    `TrainingConstants` change."""

    dense_layer: PhaseSeconds
    expert_layer: PhaseSeconds | None
    embedding: PhaseSeconds
    head: PhaseSeconds
    which: NDArray[np.int64]
    """The shard of every layout."""
    placement: Placement

    def for_layouts(self, rows: NDArray[np.int64], placement: Placement) -> PricedBlocks:
        """The same prices for layouts that are cut as these rows are."""
        return replace(self, which=self.which[rows], placement=placement)


def price_blocks(
    model: ModelSpec, training: Training, practice: Practice, table: LayoutTable, placement: Placement
) -> PricedBlocks:
    """Price each kind of block.

    Layouts share few distinct shards (tp, cp, ep, mb, sp, folds and the links they cross): only those are priced.
    """
    spans = placement.spans
    columns = (table.tp, table.cp, table.ep, table.mb, table.sp, table.expert_folds)
    first, which = distinct(*columns, spans["tp"], spans["cp"], spans["ep"])
    rows, links = table.take(first), placement.take(first)
    shard = shard_of(rows)

    def price(block: Block) -> PhaseSeconds:
        return price_block(placement.cluster.device, block, training.precision, links.seconds, len(rows))

    return PricedBlocks(
        price(dense_layer(model, training, shard, practice)),
        price(expert_layer(model, training, shard, practice)) if model.experts else None,
        price(embedding(model, training, shard, practice)),
        price(head(model, training, shard, practice)),
        which,
        placement,
    )


def model_seconds(
    priced: PricedBlocks, recompute: NDArray[np.int64], practice: Practice, constants: TrainingConstants
) -> ModelSeconds:
    """Seconds of each kind of block in every layout, with what runs again and after hiding what can hide.

    Args:
        recompute: positions in `RECOMPUTES`, one per layout; layers recompute, embedding and head do not.
    """
    cluster = priced.placement.cluster
    constants = constants.on(cluster.device)
    slowest = waiting(cluster.num_gpus, constants)
    first, which = distinct(priced.which, recompute)
    shards, again = priced.which[first], recompute[first]

    def block(seconds: PhaseSeconds, again: NDArray[np.int64]) -> BlockSeconds:
        forward, core = seconds.forward.take(shards), seconds.core.take(shards)
        input_grad = seconds.input_grad.take(shards) + recomputed(forward, core, again, practice)
        phases = (forward, input_grad, seconds.weight_grad.take(shards))
        parts = np.stack([overlapped(phase, slowest, practice, constants) for phase in phases])[:, :, which]
        return BlockSeconds(table=parts[:, :4], hidden=parts[:, 4:])

    never = np.zeros_like(again)
    return ModelSeconds(
        block(priced.dense_layer, again),
        block(priced.expert_layer, again) if priced.expert_layer else None,
        block(priced.embedding, never),
        block(priced.head, never),
    )


def shard_of(table: LayoutTable) -> Shard:
    """The parts of layouts that say how an operation is cut."""
    tp, cp, ep, mb = (column.astype(float) for column in (table.tp, table.cp, table.ep, table.mb))
    return Shard(tp=tp, cp=cp, ep=ep, mb=mb, sp=table.sp > 0, folds=table.expert_folds.astype(float))


def recomputed(forward: Seconds, core: Seconds, recompute: NDArray[np.int64], practice: Practice) -> Seconds:
    """What runs again before the backward pass."""
    full = (recompute == RECOMPUTES.index("full")).astype(float)
    selective = (recompute == RECOMPUTES.index("selective")).astype(float)
    chosen = core if practice.selective == "attention" else forward.times(0.5)
    return forward.times(full) + chosen.times(selective)


def overlapped(phase: Seconds, slowest: float, practice: Practice, constants: TrainingConstants) -> Floats:
    """Seconds of a phase after hiding what can hide, [part, shard]: computation, exposed tp, cp and ep communication,
    hidden tp and cp communication.

    Context parallelism's ring runs beside attention (arXiv 2310.01889); tensor-parallel collectives beside the
    matrix multiplications only where the program splits them. A host slower than the device shows as computation.

    Args:
        slowest: time of the slowest device over that of the average one; all others wait for it.
    """
    arithmetic = slowest / constants.held_rate
    matmul, attention = phase.matmul * arithmetic, phase.attention * arithmetic
    compute, tp = matmul + attention + phase.passes * slowest, phase.tp
    hidden_cp = np.minimum(phase.cp, constants.overlap_share * attention)
    hidden_tp = np.minimum(tp, constants.overlap_share * matmul) if practice.overlap_tensor else np.zeros_like(tp)
    compute, tp = compute + constants.interference * (hidden_tp + hidden_cp), tp - hidden_tp
    communication = tp + (phase.cp - hidden_cp) + phase.ep
    host_per_kernel = practice.operations_per_kernel * constants.host_s_per_operation
    host = phase.kernels * host_per_kernel
    if practice.host_runs_ahead:
        host = host + phase.collectives * host_per_kernel - communication
    return np.stack([np.maximum(compute, host), tp, phase.cp - hidden_cp, phase.ep, hidden_tp, hidden_cp])


def waiting(num_gpus: int, constants: TrainingConstants) -> float:
    """Time of the slowest of all devices over that of the average one: the expected maximum of so many normally
    distributed speeds, to first order 1 + sigma sqrt(2 ln n)."""
    return 1 + constants.spread * math.sqrt(2 * math.log(num_gpus))
