"""Seconds of a block: its operators priced on a device and its collectives on the links they cross."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.hardware import Device
from triaxial.plan.cost.collectives import CollectiveKind
from triaxial.plan.cost.compute import attention_seconds, gemm_seconds, pass_seconds
from triaxial.plan.cost.operators import Attention, Axis, Block, Collective, Gemm, Operator, Pass, Size
from triaxial.plan.cost.practice import attention_slowdown
from triaxial.plan.cost.timed import timed_pass_seconds
from triaxial.plan.workload import Precision

Floats = NDArray[np.float64]
CollectiveSeconds = Callable[[Axis, CollectiveKind, Floats], Floats]
"""(axis, kind, bytes) to seconds, one entry per shard."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of a list of operators by what they keep busy, one entry per shard."""

    matmul: Floats
    """Matrix multiplications outside attention."""
    attention: Floats
    passes: Floats
    tp: Floats
    cp: Floats
    ep: Floats
    kernels: Floats
    """Kernels that the host must issue, collectives apart. Counts, not seconds, like the next."""
    collectives: Floats

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: Floats | float) -> Seconds:
        return Seconds(*(getattr(self, f.name) * count for f in fields(self)))

    def take(self, rows: NDArray[np.int64]) -> Seconds:
        return Seconds(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class PhaseSeconds:
    """One block and one micro-batch."""

    forward: Seconds
    input_grad: Seconds
    weight_grad: Seconds
    core: Seconds


def price_operators(
    device: Device,
    operators: Iterable[Operator],
    precision: Precision,
    collective: CollectiveSeconds,
    shards: int,
    *,
    backward: bool,
) -> Seconds:
    """Add up seconds over a list of operators of one direction for `shards` shards at once."""
    busy = {f.name: np.zeros(shards) for f in fields(Seconds)}
    wide: Precision = "bf16" if precision in ("fp8", "fp4") else precision
    for op in operators:
        if not isinstance(op, Collective):
            busy["kernels"] += _kernels(op)
        if isinstance(op, Gemm):
            own = precision if op.narrow else wide
            seconds = op.slowdown * gemm_seconds(
                device, op.m, op.n, op.k, own, batch=op.batch, result_bytes=op.result_bytes
            )
            busy["matmul" if op.narrow else "attention"] += seconds
        elif isinstance(op, Attention):
            slowdown = 1.0 if device.timings else attention_slowdown(op.kernel, device.generation)
            busy["attention"] += slowdown * attention_seconds(
                device,
                batch=op.sequences,
                heads=op.heads,
                kv_heads=op.kv_heads,
                queries=op.queries,
                keys=op.keys,
                head_dim=op.head_dim,
                precision=wide,
                backward=op.backward,
                kernels=op.kernels,
            )
        elif isinstance(op, Pass):
            busy["passes"] += _pass_seconds(device, op, wide, backward)
        else:
            seconds = collective(op.axis, op.kind, np.broadcast_to(np.asarray(op.bytes, float), (shards,)))
            busy[op.axis] += seconds
            busy["collectives"] += seconds > 0
    return Seconds(**busy)


def _kernels(op: Gemm | Attention | Pass) -> Size:
    """Kernels that the host issues for an operator; a pass over nothing does not run."""
    if isinstance(op, Gemm):
        return 1
    return op.kernels if isinstance(op, Attention) else op.kernels * (np.asarray(op.bytes) > 0)


def _pass_seconds(device: Device, op: Pass, precision: Precision, backward: bool) -> Floats:
    """A pass over nothing does not run."""
    seconds = (
        pass_seconds(device, op.bytes)
        if device.timings is None
        else timed_pass_seconds(device.timings, op.bytes, op.kernels, precision, backward=backward)
    )
    return np.where(np.asarray(op.bytes) > 0, seconds, 0.0)


def price_block(
    device: Device,
    block: Block,
    precision: Precision,
    collective: CollectiveSeconds,
    shards: int,
) -> PhaseSeconds:
    """Seconds of one block, phase by phase."""

    def price(operators: Iterable[Operator], *, backward: bool) -> Seconds:
        return price_operators(device, operators, precision, collective, shards, backward=backward)

    return PhaseSeconds(
        forward=price(block.forward, backward=False),
        input_grad=price(block.input_grad, backward=True),
        weight_grad=price(block.weight_grad, backward=True),
        core=price(block.core, backward=False),
    )
