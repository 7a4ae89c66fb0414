"""`Pricer`: seconds of operator lists by what they wait for, at every number of tokens of a grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.hardware import Device, Precision
from triaxial.cluster.spec import Cluster
from triaxial.cluster.timings import EngineRates
from triaxial.plan.cost.collectives import CollectiveKind, Group, collective_seconds, direct_all_reduce_seconds
from triaxial.plan.cost.compute import gemm_seconds, launch_seconds, sustained_flop_per_s
from triaxial.plan.cost.constants import COMPUTE, ComputeConstants
from triaxial.plan.cost.operators import Attention, Gemm, Operator, Pass
from triaxial.plan.cost.timed import timed_pass_seconds
from triaxial.plan.serving.constants import ServingConstants, kind_of
from triaxial.plan.serving.cost.probed import probed_engine, product_seconds
from triaxial.plan.serving.engine import Engine
from triaxial.plan.serving.workload import STORED_BYTES, WeightPrecision

Floats = NDArray[np.float64]

GRID = np.concatenate([[0.0], np.unique(np.round(2 ** np.arange(0, 22.01, 0.25)))])
"""Tokens of a step at which seconds are worked out; between them they are interpolated."""
TERMS = ("weights", "compute", "kv", "passes", "launches", "all_reduce", "hops", "sampling")


@dataclass(frozen=True)
class Terms:
    """Seconds by term, [GRID], and how many kernels the host issues for them."""

    seconds: dict[str, Floats]
    kernels: float

    def __add__(self, other: Terms) -> Terms:
        total = {term: self.seconds[term] + other.seconds[term] for term in TERMS}
        return Terms(total, self.kernels + other.kernels)

    def times(self, count: int) -> Terms:
        return Terms({term: count * values for term, values in self.seconds.items()}, count * self.kernels)

    @property
    def total(self) -> Floats:
        found: Floats = np.sum(list(self.seconds.values()), axis=0)
        return found


def no_terms() -> Terms:
    return Terms({term: np.zeros_like(GRID) for term in TERMS}, 0)


@dataclass(frozen=True)
class Pricer:
    """Prices operators on one rank of one layout."""

    cluster: Cluster
    tp: Group
    precision: WeightPrecision
    engine: Engine
    constants: ServingConstants

    @property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def device_kind(self) -> str:
        """Its generation, or `gddr` (`ServingConstants.stream`)."""
        return kind_of(self.device)

    @property
    def wide(self) -> WeightPrecision:
        """What activations are, and weights that are never quantised."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @cached_property
    def probed(self) -> EngineRates | None:
        """What a probe has measured of the engine."""
        timings = probed_engine(self.device, self.engine)
        return None if timings is None else timings.rates_in(self.wide)

    @property
    def kernel_s(self) -> float:
        """Start of a kernel; what a probe has timed includes it."""
        if self.device.timings is not None:
            return 0.0
        return self.constants.graph_kernel_s if self.engine.graphs else self.constants.eager_kernel_s

    def attention_kernel(self) -> Terms:
        """The start of one attention kernel; what it does is priced by `AttentionCost`."""
        terms = no_terms()
        terms.seconds["launches"] += np.where(GRID > 0, self.kernel_s, 0.0)
        return replace(terms, kernels=1)

    def terms(self, operators: Iterable[Operator]) -> Terms:
        """Seconds of a list; a step without tokens takes none."""
        found = no_terms().seconds
        kernels = 0
        for op in operators:
            if isinstance(op, Gemm):
                weights, compute = self._gemm(op)
                found["weights"] += weights
                found["compute"] += compute
                kernels += 1
                if op.narrow and (cast := self._cast_apart) is not None:
                    found["passes"] += op.batch * op.m * op.k * (2 + STORED_BYTES[cast]) / self.stream
                    kernels += 1
            elif isinstance(op, Pass):
                found["passes"] += self._pass(op)
                kernels += int(np.max(op.kernels))
            elif not isinstance(op, Attention):
                size = np.broadcast_to(np.asarray(op.bytes, float), GRID.shape)
                if size.any() and self.tp.size > 1:
                    found["all_reduce"] += self._collective(op.kind, size)
                    kernels += 1
        found["launches"] += kernels * self.kernel_s
        return Terms({term: np.where(GRID > 0, values, 0.0) for term, values in found.items()}, kernels)

    @cached_property
    def _cast_apart(self) -> WeightPrecision | None:
        """What a kernel of its own casts products' inputs to: fp4 always, whose scales are those of 16 neighbours."""
        narrow: tuple[WeightPrecision, ...] = ("fp4", "fp8", "int8") if self.engine.casts_apart else ("fp4",)
        cast = multiplied_in(self.device, self.precision)
        return next((precision for precision in narrow if precision == cast), None)

    @property
    def stream(self) -> float:
        """Bytes per second of weights that are read back to back."""
        return self.device.memory_bandwidth_bytes_per_s * self.constants.stream_share(self.device)

    def _collective(self, kind: CollectiveKind, size: Floats) -> Floats:
        if kind == "all_reduce" and self.engine.direct_all_reduce:
            rate_share = self.constants.direct_rate
            return np.asarray(direct_all_reduce_seconds(self.cluster, size, self.tp, rate_share=rate_share))
        return np.asarray(collective_seconds(self.cluster, kind, size, self.tp))

    def _pass(self, op: Pass) -> Floats:
        if self.probed is not None:
            launched = np.asarray(op.kernels) * self.probed.pass_launch_s
            return np.asarray(launched + np.asarray(op.bytes) / self.probed.pass_bytes_per_s)
        if self.device.timings is not None:
            return timed_pass_seconds(self.device.timings, op.bytes, op.kernels, self.wide)
        return np.asarray(op.bytes / self.stream)

    def _gemm(self, op: Gemm) -> tuple[Floats, Floats]:
        """Seconds that reading the weights takes, and what the product takes beyond."""
        if self.probed is not None:
            whole = op.batch * product_seconds(self.probed.products, op.m, op.n, op.k)
            one_row = op.batch * product_seconds(self.probed.products, 1, op.n, op.k)
            weights = np.minimum(np.broadcast_to(one_row, whole.shape), whole)
            return weights, whole - weights
        stored: WeightPrecision = self.precision if op.narrow else self.wide
        seconds = gemm_seconds(
            self._streaming_device,
            np.maximum(op.m, 1e-9),
            op.n,
            op.k,
            multiplied_in(self.device, stored),
            batch=op.batch,
            constants=self._compute,
            weight_bytes=STORED_BYTES[stored],
        )
        whole = seconds if self.device.timings is not None else seconds - launch_seconds(self.device)
        read = op.batch * op.k * op.n * STORED_BYTES[stored] / self.stream
        weights = np.minimum(np.broadcast_to(read, whole.shape), whole)
        return weights, whole - weights

    @cached_property
    def _streaming_device(self) -> Device:
        """The device with the memory efficiency of weights read back to back."""
        return self.device.model_copy(
            update={"memory_efficiency": self.stream / self.device.memory_bandwidth_bytes_per_s}
        )

    @cached_property
    def _compute(self) -> ComputeConstants:
        """Engines cast a product's input in the kernel before it, and hold less than an isolated kernel's rate."""
        held = self.constants.held_rate
        figures = {
            generation: replace(figures, wide=figures.wide * held, narrow=figures.narrow * held)
            for generation, figures in COMPUTE.generations.items()
        }
        return replace(COMPUTE, cast_launch_s=0.0, cast_bytes=0.0, generations=figures)

    @property
    def attention_flop_per_s(self) -> float:
        """16-bit rate of products whose operands fit their kernel."""
        return sustained_flop_per_s(self.device, multiplied_in(self.device, "bf16"), self._compute)


def multiplied_in(device: Device, stored: WeightPrecision) -> Precision:
    """The type in which a weight is multiplied: its own where the device has units for it that are no slower than those
    for 16 bits; int4 is only storage."""
    wide: Precision = "bf16" if "bf16" in device.peak_flop_per_s else "fp16"
    peaks = device.peak_flop_per_s
    own = stored != "int4" and stored in peaks and (wide not in peaks or peaks[stored] >= peaks[wide])
    return stored if own or stored == "fp32" else wide
