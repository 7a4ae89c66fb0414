"""Seconds of the model's three kinds of block for every layout: priced once per distinct shard, then looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.hardware import Device
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


POWER_LIMITED_W_PER_TFLOP = 1.0
"""Watts per peak 16-bit TFLOP/s below which power, not the clock's ceiling, limits long runs of matrix products: the
A100 has 1.28, the H100 0.71, Blackwell about 0.5."""


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of one block and micro-batch."""

    table: Floats
    """[phase, part, layout]: forward, input gradient (with recomputation), weight gradient; and of each computation,
    then exposed communication on the tp, cp and ep axes."""

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


@dataclass(frozen=True)
class ModelSeconds:
    """Blocks of one model in every layout."""

    dense_layer: BlockSeconds
    expert_layer: BlockSeconds | None
    """None in a model without experts."""
    embedding: BlockSeconds
    head: BlockSeconds

    def on_rank(self, rank: Loads) -> Floats:
        """Seconds of one micro-batch of all that ranks hold, [phase, part, layout]."""
        table: Floats = (
            rank.dense_layers * self.dense_layer.table
            + rank.embedding * self.embedding.table
            + rank.head * self.head.table
        )
        if self.expert_layer:
            table = table + rank.expert_layers * self.expert_layer.table
        return table

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

    Layouts share few distinct shards (tp, cp, ep, mb, sp and the links they cross): only those are priced.
    """
    spans = placement.spans
    columns = (table.tp, table.cp, table.ep, table.mb, table.sp)
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
    slowest, rate = waiting(cluster.num_gpus, constants), held_rate(cluster.device, constants)
    first, which = distinct(priced.which, recompute)
    shards, again = priced.which[first], recompute[first]

    def block(seconds: PhaseSeconds, again: NDArray[np.int64]) -> BlockSeconds:
        forward, core = seconds.forward.take(shards), seconds.core.take(shards)
        input_grad = seconds.input_grad.take(shards) + recomputed(forward, core, again, practice)
        phases = (forward, input_grad, seconds.weight_grad.take(shards))
        table = np.stack([exposed(phase, slowest, rate, practice, constants) for phase in phases])
        return BlockSeconds(table[:, :, which])

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
    return Shard(tp=tp, cp=cp, ep=ep, mb=mb, sp=table.sp > 0)


def recomputed(forward: Seconds, core: Seconds, recompute: NDArray[np.int64], practice: Practice) -> Seconds:
    """What runs again before the backward pass."""
    full = (recompute == RECOMPUTES.index("full")).astype(float)
    selective = (recompute == RECOMPUTES.index("selective")).astype(float)
    chosen = core if practice.selective == "attention" else forward.times(0.5)
    return forward.times(full) + chosen.times(selective)


def exposed(phase: Seconds, slowest: float, rate: float, practice: Practice, constants: TrainingConstants) -> Floats:
    """Seconds of a phase by part, [part, shard], after hiding what can hide.

    Context parallelism's ring runs beside attention (arXiv 2310.01889); tensor-parallel collectives beside the
    matrix multiplications only where the program splits them. A host slower than the device shows as computation.

    Args:
        slowest: time of the slowest device over that of the average one; all others wait for it.
        rate: share of an isolated kernel's arithmetic rate that devices hold.
    """
    arithmetic = slowest / rate
    matmul, attention = phase.matmul * arithmetic, phase.attention * arithmetic
    compute, tp = matmul + attention + phase.passes * slowest, phase.tp
    hidden_cp = np.minimum(phase.cp, constants.overlap_share * attention)
    if practice.overlap_tensor:
        hidden_tp = np.minimum(tp, constants.overlap_share * matmul)
        compute, tp = compute + constants.interference * hidden_tp, tp - hidden_tp
    communication = tp + (phase.cp - hidden_cp) + phase.ep
    host = phase.kernels * constants.host_s_per_kernel + phase.collectives * constants.host_s_per_collective
    compute = np.maximum(compute + constants.interference * hidden_cp, host - communication)
    return np.stack([compute, tp, phase.cp - hidden_cp, phase.ep])


def held_rate(device: Device, constants: TrainingConstants) -> float:
    """Share of an isolated kernel's arithmetic rate that a device holds in training. One with little power for its
    peak lowers its clock when every multiprocessor is busy for long."""
    power = device.power_w / (device.peak("fp16") / 1e12)
    return constants.held_rate * (constants.throttled_rate if power < POWER_LIMITED_W_PER_TFLOP else 1.0)


def waiting(num_gpus: int, constants: TrainingConstants) -> float:
    """Time of the slowest of all devices over that of the average one: the expected maximum of so many normally
    distributed speeds, to first order 1 + sigma sqrt(2 ln n)."""
    return 1 + constants.spread * math.sqrt(2 * math.log(num_gpus))
