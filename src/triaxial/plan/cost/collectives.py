"""What a collective costs: seconds by kind, bytes and how its group lies on the tiers of a cluster.

Bytes follow nccl-tests: the whole buffer of an all-reduce, a broadcast or a send; all ranks' blocks together for an
all-gather (its output) and a reduce-scatter (its input); one rank's whole buffer for an all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from triaxial import BadInput
from triaxial.cluster.hardware import NETWORK_LINKS, Tier
from triaxial.cluster.spec import Cluster
from triaxial.plan.cost.compute import launch_seconds
from triaxial.plan.cost.constants import COLLECTIVES, CollectiveConstants
from triaxial.plan.cost.timed import timed_collective_seconds

CollectiveKind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send_recv", "broadcast"]
Seconds = npt.NDArray[np.float64]

_BETWEEN_PEERS = frozenset({"all_to_all", "send_recv"})
"""Collectives made of point-to-point messages, for which NCCL has no LL128."""
_ONE_RING = frozenset({"pcie", "pcie-host", "pcie-socket"})
"""Links over which NCCL finds a single ring, which leaves a unit by one device's link only."""
_MANY_CHANNELS = frozenset({"nvlink2", "nvlink3", "nvlink4", "nvlink5", "xgmi"})
"""Links whose rate NCCL reaches with many channels, of which a message to a single peer gets a few."""
_OWN_TUNER = frozenset({"efa", "efa1"})
"""Networks whose NCCL plugin chooses algorithms by measurement (aws-ofi-nccl)."""


@dataclass(frozen=True)
class Group:
    """How one of an axis's groups of ranks lies on a cluster's tiers, while all the axis's groups talk at once."""

    members: tuple[int, ...]
    """Per tier, innermost first: ranks of the group under one unit of the tier."""
    sharing: tuple[float, ...]
    """Per tier: groups that talk at once under one unit, and so share the links that leave it."""

    @property
    def size(self) -> int:
        return self.members[-1]

    def within(self, tier: int) -> Group:
        """Those of its ranks that stand under one unit of a tier, counted from the innermost."""
        return Group(tuple(min(members, self.members[tier]) for members in self.members), self.sharing)


def group_of(cluster: Cluster, sizes: Mapping[str, int], axis: str) -> Group:
    """Where an axis's groups lie when ranks are numbered with the first axis fastest.

    Args:
        sizes: ranks of every axis, from the fastest-varying on the ranks to the slowest (`Layout.order`).

    Raises:
        BadInput: an unknown axis, or more ranks than the cluster has.
    """
    if axis not in sizes:
        raise BadInput(f"no axis {axis!r}: the axes are {', '.join(sizes)}")
    world = math.prod(sizes.values())
    if world > cluster.num_gpus:
        raise BadInput(f"{world} ranks are more than the {cluster.num_gpus} GPUs of {cluster.name}")
    names = list(sizes)
    stride = math.prod(sizes[name] for name in names[: names.index(axis)])
    members = [min(sizes[axis], max(1, math.ceil(tier.ranks / stride))) for tier in cluster.tiers]
    members[-1] = sizes[axis]
    sharing = [max(1.0, min(tier.ranks, world) / under) for tier, under in zip(cluster.tiers, members)]
    return Group(members=tuple(members), sharing=tuple(sharing))


@dataclass(frozen=True)
class _Level:
    """A tier whose links a group uses: it joins `fan_out` units below, each with `inner` of the group's ranks."""

    tier: Tier
    inner: int
    fan_out: int
    bytes_per_s: float
    """What leaves a unit below for this group in one direction, from all its ranks there."""
    sender_bytes_per_s: float
    """What leaves it from one of them."""
    latency_s: float
    ramp_s: float

    @property
    def is_network(self) -> bool:
        return self.tier.link in NETWORK_LINKS

    @property
    def ring_bytes_per_s(self) -> float:
        return self.sender_bytes_per_s if self.tier.link in _ONE_RING else self.bytes_per_s


def _levels(cluster: Cluster, group: Group, constants: CollectiveConstants) -> list[_Level]:
    """The tiers that the group crosses, innermost first."""
    levels = []
    inner, ranks_below, sharing = 1, 1, 1.0
    for tier, members, next_sharing in zip(cluster.tiers, group.members, group.sharing):
        fan_out = math.ceil(members / inner)
        if fan_out > 1:
            figures = constants.links[tier.link]
            rate = tier.bandwidth_bytes_per_s * (tier.efficiency or figures.efficiency) / tier.oversubscription
            links = tier.links
            if tier.mesh_rings:
                links *= tier.mesh_rings[min(members - 2, len(tier.mesh_rings) - 1)]
            share, per_rank = links / sharing, links / ranks_below
            levels.append(
                _Level(
                    tier=tier,
                    inner=inner,
                    fan_out=fan_out,
                    bytes_per_s=rate * min(share, max(1.0, inner * per_rank)),
                    sender_bytes_per_s=rate * min(share, max(1.0, per_rank)),
                    latency_s=figures.latency_s if tier.latency_s is None else tier.latency_s,
                    ramp_s=figures.ramp_s,
                )
            )
        inner, ranks_below, sharing = members, tier.ranks, next_sharing
    return levels


@dataclass(frozen=True)
class _Way:
    """An algorithm on a group: seconds = launch + hops' latency + the slowest tier's time, by some protocol."""

    latency_s: float
    tiers: tuple[tuple[float, float], ...]
    """Seconds per byte of the message on each tier, and the tier's ramp."""

    def wire(self, size: Seconds) -> Seconds:
        return size * max(cost for cost, _ in self.tiers)

    def chunked(self, size: Seconds) -> Seconds:
        """Seconds of a message cut into c chunks so that they overlap along its path: on a tier, where it takes
        w seconds, w + c ramp + w / c, least for c = sqrt(w / ramp)."""
        longest = np.zeros_like(size)
        for cost, ramp_s in self.tiers:
            wire = size * cost
            longest = np.maximum(longest, wire + 2 * np.sqrt(ramp_s * wire))
        return longest


def collective_seconds(
    cluster: Cluster,
    kind: CollectiveKind,
    bytes: npt.ArrayLike,
    group: Group,
    constants: CollectiveConstants = COLLECTIVES,
) -> Seconds:
    """Seconds of one collective by the fastest of the algorithms and protocols that NCCL chooses from.

    Args:
        bytes: message sizes; the module says what they count.
        group: how the ranks lie (`group_of`).

    Raises:
        BadInput: an unknown kind.
    """
    if kind not in get_args(CollectiveKind):
        raise BadInput(f"unknown collective {kind!r}: choose one of {', '.join(get_args(CollectiveKind))}")
    size = np.asarray(bytes, dtype=np.float64)
    levels = _levels(cluster, group, constants)
    if not levels:
        return np.zeros_like(size)
    timed = timed_collective_seconds(cluster, kind, size, group.members, group.sharing)
    if timed is not None:
        return timed
    start = constants.launch_share * launch_seconds(cluster.device)
    low_latency = [constants.ll] if kind in _BETWEEN_PEERS else [constants.ll, constants.ll128]
    best = np.full_like(size, np.inf)
    for way in _ways(kind, group.size, levels, constants):
        wire = way.wire(size)
        for protocol in low_latency:
            best = np.minimum(best, way.latency_s * protocol.latency + wire / protocol.bandwidth)
        best = np.minimum(best, way.latency_s * constants.simple.latency + way.chunked(size))
    if kind == "all_reduce" and any(level.tier.switch_reduces for level in levels):
        way = _switched_all_reduce(levels, constants)
        best = np.minimum(best, way.latency_s + way.chunked(size))
    return np.asarray(start + best)


def direct_all_reduce_seconds(
    cluster: Cluster,
    bytes: npt.ArrayLike,
    group: Group,
    constants: CollectiveConstants = COLLECTIVES,
    rate_share: float = 1.0,
) -> Seconds:
    """Seconds of an all-reduce by an inference engine that has kernels which read the peers' memory over NVLink.

    One shot: every rank reads all buffers and adds them up. Two shots: every rank adds up its part, then all read the
    parts. Each shot waits for the peers once before and once after. NCCL takes what these cannot do or does faster.

    Args:
        rate_share: of the rate that NCCL's long messages reach, what these kernels' reads do.
    """
    size = np.asarray(bytes, dtype=np.float64)
    best = collective_seconds(cluster, "all_reduce", size, group, constants)
    levels = _levels(cluster, group, constants)
    if len(levels) != 1 or levels[0].is_network or levels[0].tier.link in _ONE_RING:
        return best
    level, peers = levels[0], group.size - 1
    wait = constants.peer_hops * level.latency_s
    rate = level.bytes_per_s * rate_share
    one_shot = 2 * wait + peers * size / rate
    two_shots = 3 * wait + 2 * peers / group.size * size / rate
    return np.minimum(best, launch_seconds(cluster.device) + np.minimum(one_shot, two_shots))


def _ways(kind: CollectiveKind, ranks: int, levels: list[_Level], constants: CollectiveConstants) -> list[_Way]:
    outer = levels[-1]
    if kind == "all_reduce":
        return [_ring(levels, ranks, 2 * (ranks - 1)), _tree_all_reduce(levels)]
    if kind in ("all_gather", "reduce_scatter"):
        return [_ring(levels, ranks, ranks - 1, own=constants.local_copy)]
    if kind == "all_to_all":
        return [_all_to_all(levels, ranks, constants)]
    if kind == "broadcast":
        return [_Way(_tree_latency(levels), _costs(levels, [1 / level.ring_bytes_per_s for level in levels]))]
    in_part = outer.tier.link in _MANY_CHANNELS and outer.tier.efficiency is None
    rate = outer.sender_bytes_per_s * (constants.peer_share if in_part else 1.0)
    return [_Way(constants.peer_hops * outer.latency_s, _costs([outer], [1 / rate]))]


def _costs(levels: list[_Level], seconds_per_byte: list[float]) -> tuple[tuple[float, float], ...]:
    return tuple((cost, level.ramp_s) for cost, level in zip(seconds_per_byte, levels))


def _ring(levels: list[_Level], ranks: int, steps: int, own: float = 0.0) -> _Way:
    """Every rank passes blocks of 1/ranks to its neighbour, `steps` times; the ring leaves each unit once.

    A block goes round all edges, fast and slow, so a step costs their mean latency. Bandwidth: Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69 (2009), section 3.
    """
    leaving = [ranks / level.inner for level in levels]
    edges = [here - beyond for here, beyond in zip(leaving, [*leaving[1:], 0.0])]
    step_latency = sum(count * level.latency_s for count, level in zip(edges, levels)) / ranks
    cost = [(steps + own) / ranks / level.ring_bytes_per_s for level in levels]
    return _Way(steps * step_latency, _costs(levels, cost))


def _tree_all_reduce(levels: list[_Level]) -> _Way:
    """Reduced up and broadcast down: a chain inside a node, double binary trees between nodes (Sanders, Speck,
    Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35 (2009)).

    Every link below the root carries the whole message both up and down. Between two nodes it carries it once, but
    NCCL counts twice all the same (tuning.cc: a tree's algorithm bandwidth is half its bus bandwidth) and so turns to
    the ring; EFA's plugin chooses by itself.
    """
    once = [level.fan_out == 2 and level.tier.link in _OWN_TUNER for level in levels]
    cost = [(1.0 if single else 2.0) / level.ring_bytes_per_s for single, level in zip(once, levels)]
    return _Way(2 * _tree_latency(levels), _costs(levels, cost))


def _tree_latency(levels: list[_Level]) -> float:
    hops = [math.ceil(math.log2(level.fan_out)) if level.is_network else level.fan_out - 1 for level in levels]
    return sum(count * level.latency_s for count, level in zip(hops, levels))


def _all_to_all(levels: list[_Level], ranks: int, constants: CollectiveConstants) -> _Way:
    """Every rank sends 1/ranks of its buffer to every other, all at once: what leaves a unit limits it."""
    own = constants.local_copy / ranks / levels[0].bytes_per_s
    cost = [level.inner * (ranks - level.inner) / ranks / level.bytes_per_s + own for level in levels]
    return _Way(constants.peer_hops * max(level.latency_s for level in levels), _costs(levels, cost))


def _switched_all_reduce(levels: list[_Level], constants: CollectiveConstants) -> _Way:
    """Switches add what their devices or nodes hold and multicast the sum: a link carries the message once, and
    inside a node the device's own share once more (NCCL's NVLS and CollNet). Tiers that cannot do it reduce, scatter
    and gather as usual; messages are pipelined through all tiers, so the slowest one counts."""
    latency, cost = constants.switch_launch_s, []
    for level in levels:
        link = level.tier.link
        if level.tier.switch_reduces and level.is_network:
            latency += 2 * level.latency_s
            cost.append(1 / level.bytes_per_s)
        elif level.tier.switch_reduces:
            reached = constants.links[link].efficiency
            share = constants.switch_efficiency.get(link, reached) / reached
            cost.append((1 + 1 / level.fan_out) / (level.bytes_per_s * share))
        else:
            latency += 2 * _tree_latency([level])
            cost.append(2 * (level.fan_out - 1) / level.fan_out / level.ring_bytes_per_s)
    return _Way(latency, _costs(levels, cost))
