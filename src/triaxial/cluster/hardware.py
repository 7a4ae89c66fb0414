"""`Device` and `Tier`: what a cluster is made of.

Every bandwidth is per direction and decimal (1 GB/s = 10^9 bytes/s), every peak is dense (no structured sparsity).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from triaxial import BadInput
from triaxial.cluster.timings import DeviceTimings
from triaxial.cluster.units import Bytes, BytesPerSecond, FlopPerSecond, Seconds

Precision = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"]
Generation = Literal["volta", "ampere", "ada", "hopper", "blackwell", "cdna3", "cpu"]
LinkKind = Literal[
    "nvlink2",
    "nvlink3",
    "nvlink4",
    "nvlink5",
    "xgmi",
    "pcie",
    "pcie-host",
    "pcie-socket",
    "infiniband",
    "roce",
    "efa",
    "efa1",
    "ethernet",
    "memory",
]
"""`pcie` is peer to peer below one switch, `pcie-host` staged through the memory of one CPU socket, `pcie-socket` through
both sockets; `memory` is the one that processes of a host share; `efa1` is the first generation of AWS's EFA (p4d), `efa` the second (p5)."""

NETWORK_LINKS: frozenset[LinkKind] = frozenset({"infiniband", "roce", "efa", "efa1", "ethernet"})
"""Links between nodes; all others are inside one."""

BYTES_PER_ELEMENT: dict[Precision, float] = {
    "fp64": 8.0,
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5,
    "int4": 0.5,
}


_MeasuredShare = Annotated[float | None, Field(gt=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Frozen):
    """One accelerator. The optional figures are measured ones (a probe writes them); without them the cost model
    uses what its generation achieves."""

    name: str
    generation: Generation
    peak_flop_per_s: dict[Precision, FlopPerSecond] = Field(min_length=1)
    """Dense matrix peaks as published, without structured sparsity."""
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: BytesPerSecond
    sm_count: PositiveInt
    """Streaming multiprocessors (compute units on AMD): what a wave of tiles fills."""
    power_w: PositiveFloat | None = None
    """Power limit, which bounds the clock that a long run of matrix products can hold; None where rates are measured."""
    gemm_efficiency: _MeasuredShare = None
    """Measured share of the 16-bit peak that a large matrix product reaches."""
    memory_efficiency: _MeasuredShare = None
    """Measured share of the memory bandwidth that a long pass reaches."""
    launch_s: Seconds | None = None
    """Measured time of the smallest kernel."""
    timings: DeviceTimings | None = None
    """Points that a probe has measured; they replace the roofline."""
    source: str = ""

    def __hash__(self) -> int:  # the dict of peaks has none
        return hash((self.name, self.memory_bytes, self.memory_bandwidth_bytes_per_s))

    def peak(self, precision: Precision) -> float:
        """Dense peak in FLOP/s for a precision.

        Raises:
            BadInput: the device has no units for it.
        """
        if precision not in self.peak_flop_per_s:
            known = ", ".join(self.peak_flop_per_s)
            raise BadInput(f"{self.name} has no {precision} matrix units; choose one of {known}")
        return self.peak_flop_per_s[precision]


class Tier(_Frozen):
    """One level of links. It joins the units of the tier below (single devices, at the innermost) into one unit."""

    name: str
    ranks: PositiveInt
    """Devices under one unit of this tier."""
    link: LinkKind
    """What the links are, for the defaults of `latency_s` and `efficiency`."""
    bandwidth_bytes_per_s: BytesPerSecond
    """Rate of one link in one direction."""
    links: PositiveFloat = 1.0
    """Links that leave each unit below, shared by the devices in it: a node's NICs; 1 for a device on a switch."""
    oversubscription: float = Field(default=1.0, ge=1)
    """How many times more bandwidth enters this tier's switches than they carry when all talk at once."""
    mesh_rings: tuple[PositiveFloat, ...] = ()
    """Without a switch: links' worth of bandwidth that rings over the first 2, 3, 4... devices can use."""
    switch_reduces: bool = False
    """The switches add and multicast (NVLink SHARP inside a domain, InfiniBand SHARP between nodes)."""
    latency_s: Seconds | None = None
    """Time of one small message over one hop."""
    efficiency: _MeasuredShare = None
    """Share of the rate that long messages reach."""
