"""Constants of the device and link costs: every one with its meaning and where it comes from.

"Fitted" ones are what `bench/fit_components.py` prints for gemm.csv and collectives.csv (2026-11-24); their errors, in
sample and cross-validated, stand in docs/measured/components.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from triaxial.cluster.hardware import Generation, LinkKind


@dataclass(frozen=True)
class DeviceFigures:
    """What a generation of devices achieves of its datasheet. A device's own measured figures replace them."""

    wide: float
    """Share of the dense peak that a large product in 16 bits or more sustains at the reference power: the clock
    that the power limit leaves, and the pipeline's stalls."""
    narrow: float
    """The same for 8 and 4 bits."""
    memory: float
    """Share of the memory bandwidth that a long stream reaches."""
    launch_s: float
    """Smallest kernel, from its start to the next one's."""
    reference_w_per_tflop: float
    """Power limit over 16-bit peak of the device that the figures describe, in W per TFLOP/s."""
    flash_head_dim: float
    """Head dimension at which the softmax takes as long as the products of a fused attention: its rate is
    d / (d + flash_head_dim) of the sustained one. Exponentials per clock are the same since Volta, products are not."""


@dataclass(frozen=True)
class ComputeConstants:
    """What the times of `plan/cost/compute.py` are made of, beside a device's datasheet."""

    ramp_k: float
    """Filling and draining a tile's pipeline and writing its result, in units of the summed dimension k."""
    tile_traffic: float
    """Slowdown of small tiles: a (tm, tn) tile loads 1/tm + 1/tn operand elements per multiplication, and runs at
    1 / (1 + tile_traffic (1/tm + 1/tn)) of the multipliers' rate."""
    tail: float
    """Share of the last, partly filled wave of tiles that is lost; 1 is full wave quantisation."""
    cast_launch_s: float
    """Kernels beside an 8- or 4-bit product: they find the scale of its 16-bit input and cast it."""
    cast_bytes: float
    """Bytes that these kernels move per element of that input."""
    flash_ramp_keys: float
    """Starting and finishing a block of queries in a fused attention, in keys; more for the backward pass, which does
    more per key."""
    flash_backward: float
    """Rate of a fused attention's backward pass over long sequences as a share of its forward rate."""
    generations: Mapping[Generation, DeviceFigures]


# Fitted but for the last: the A100 SXM (8-bit has no rows: as 16-bit), the H100 SXM, the L40S. The last is read off the
# rates of FlashAttention-2 on A100s (up to 73 % of the peak forward, 2307.08691, abstract) and of FlashAttention-3 on the
# H100 (648 TFLOP/s forward with 16k keys, 2407.08608, figure 5), at head dimension 128; Ada has no rows: as Ampere.
_AMPERE = DeviceFigures(0.854, 0.854, 0.780, 4.95e-6, 400 / 312, 20.0)
_HOPPER = DeviceFigures(0.828, 0.704, 0.821, 3.25e-6, 700 / 989.4, 30.0)
_ADA = DeviceFigures(0.667, 0.613, 0.819, 2.0e-6, 350 / 362.05, 20.0)
_BLACKWELL_LAUNCH_S = 4.9e-6  # from the small collectives of B200 and GB200, by `launch_share`

COMPUTE = ComputeConstants(
    # fitted
    ramp_k=103.0,
    tile_traffic=7.4,
    tail=0.25,
    cast_launch_s=9.1e-6,
    cast_bytes=4.2,
    # read off FlashAttention-3 (arXiv 2407.08608) figures 5 and 6: 561 TFLOP/s backward at head dimension 128 and 16k
    # keys, 467 and 316 forward and backward at 512 keys, on an H100 that multiplies at 816
    flash_ramp_keys=150.0,
    flash_backward=0.87,
    generations=MappingProxyType(
        {
            "ampere": _AMPERE,
            "ada": _ADA,
            "hopper": _HOPPER,
            # No rows. Blackwell and CDNA 3 are made in Hopper's class of process, so an operation takes about Hopper's
            # energy: its shares at its power per FLOP. Volta's process is older: Ampere's shares at the V100's power.
            "blackwell": replace(_HOPPER, launch_s=_BLACKWELL_LAUNCH_S),
            "cdna3": _HOPPER,
            "volta": replace(_AMPERE, reference_w_per_tflop=300 / 125),
        }
    ),
)


@dataclass(frozen=True)
class LinkFigures:
    """What a kind of link does with messages. A tier's own measured figures replace the first two."""

    latency_s: float
    """One hop of the smallest message."""
    efficiency: float
    """Share of the published rate that a long message reaches."""
    ramp_s: float
    """Time of the smallest efficient chunk over one hop. A message that takes w seconds on the wire is cut into
    chunks that are pipelined; with the best size that costs 2 sqrt(ramp_s w) more."""


@dataclass(frozen=True)
class Protocol:
    """How NCCL moves a message: latency traded for bandwidth."""

    latency: float
    """Hop latency as a multiple of the link's."""
    bandwidth: float
    """Share of the rate that long messages reach."""


@dataclass(frozen=True)
class CollectiveConstants:
    """What the times of `plan/cost/collectives.py` are made of, beside a cluster's published rates."""

    launch_share: float
    """Start and end of a collective, in launches of the device's smallest matrix product."""
    local_copy: float
    """A rank's own block in an all-gather, reduce-scatter or all-to-all is copied inside the device: its cost as a
    share of sending it."""
    peer_hops: float
    """Start of a message between two ranks, in hops: NCCL's point-to-point sends agree on a buffer first."""
    peer_share: float
    """Share of a device's NVLinks that a message to a single peer uses, where no probe has shown what it does."""
    ll: Protocol
    """A flag with every 4 bytes."""
    ll128: Protocol
    """A flag with every 120 bytes."""
    simple: Protocol
    """A flag per chunk."""
    switch_launch_s: float
    """Extra start of a collective in which the switch adds (NVLink SHARP): multicast barriers."""
    switch_efficiency: Mapping[LinkKind, float]
    """Share of the published rate that in-switch addition reaches, where switches can do it."""
    links: Mapping[LinkKind, LinkFigures]


COLLECTIVES = CollectiveConstants(
    # fitted, but for the links that say otherwise
    launch_share=1.64,
    local_copy=0.29,
    peer_hops=2.1,
    # not fitted: 25 and 28 MB to the next stage took 0.53 and 0.60 ms over NVLink3 (arXiv 2401.10241, table 9)
    peer_share=0.25,
    ll=Protocol(latency=1.0, bandwidth=0.02),
    ll128=Protocol(latency=1.35, bandwidth=0.41),
    simple=Protocol(latency=2.2, bandwidth=1.0),
    switch_launch_s=35e-6,
    switch_efficiency=MappingProxyType({"nvlink4": 0.70, "nvlink5": 0.57}),
    links=MappingProxyType(
        {
            "nvlink2": LinkFigures(2.1e-6, 0.91, 0.17e-6),
            "nvlink3": LinkFigures(0.97e-6, 0.78, 4.8e-6),
            "nvlink4": LinkFigures(0.63e-6, 0.83, 2.05e-6),
            "nvlink5": LinkFigures(1.12e-6, 0.78, 3.3e-6),
            "xgmi": LinkFigures(1.2e-6, 0.78, 2.7e-6),  # no rows: mean of the NVLinks
            "pcie": LinkFigures(1.4e-6, 0.81, 0.82e-6),
            "pcie-host": LinkFigures(1.0e-6, 0.17, 0.1e-6),
            "pcie-socket": LinkFigures(0.3e-6, 0.05, 1.5e-6),
            "memory": LinkFigures(5.0e-6, 0.90, 0.1e-6),  # assumed; a probe writes measured figures
            "efa": LinkFigures(32e-6, 0.69, 58e-6),
            "efa1": LinkFigures(73e-6, 0.89, 60e-6),
            # No rows. InfiniBand: latencies of NCCL's own tuning model (v2.12 tuning.cc, network: tree LL 5 us, ring
            # Simple 9.6 us), usual efficiency; the others: assumed from it.
            "infiniband": LinkFigures(5.0e-6, 0.90, 9.6e-6),
            "roce": LinkFigures(6.0e-6, 0.90, 9.6e-6),
            "ethernet": LinkFigures(25e-6, 0.80, 25e-6),
        }
    ),
)
