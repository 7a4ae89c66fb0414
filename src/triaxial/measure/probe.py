"""The probe: what the devices and links of this cluster really do, as a cluster file that the planner reads."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.measure.fit import LinkFit, fit_tier
from triaxial.measure.links import MeasuredLink, network_bytes_per_s, slow_links
from triaxial.measure.machine import describe_device, inside_bytes_per_s, tiers_of
from triaxial.measure.probe_compute import device_timings, reference_seconds
from triaxial.measure.probe_engine import engine_timings
from triaxial.measure.probe_links import LinkTimings, link_timings, neighbour_rates
from triaxial.measure.stopwatch import Stopwatch
from triaxial.parallel.host import host_identity, machine_identity
from triaxial.parallel.mesh import Axis
from triaxial.plan.workload import Precision

_BUDGET_S = 0.02
"""That every piece of work is repeated for."""
_SLOW_RANK = 0.9
"""Share of the median rate below which a rank is named."""

T = TypeVar("T")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Probe:
    """What was found."""

    cluster: Cluster
    fits: tuple[LinkFit, ...]
    """Latency and bandwidth of every tier, with what they leave unexplained."""
    contention: dict[str, float]
    """By axis: time of the largest all-reduce while all groups of the axis talk over its time alone."""
    outliers: tuple[str, ...]
    """Sentences on ranks and links that are slower than the others."""


def probe(rank: int, device: torch.device, precisions: tuple[Precision, ...], tell: Tell) -> Probe:
    """Measure this cluster; every rank of the world must call it, and gets the same answer.

    Args:
        tell: called with the name of what comes next.

    Raises:
        BadInput: nodes with different numbers of ranks.
    """
    world = Axis("world", tuple(range(dist.get_world_size())), rank, dist.group.WORLD)
    nodes = _nodes(world.size)
    per_machine = max(Counter(_from_all(world.size, machine_identity())).values())
    turns = max(1.0, per_machine / (os.cpu_count() or 1)) if device.type == "cpu" else 1.0
    watch = Stopwatch(world, device, _BUDGET_S, turns=turns if torch.get_num_threads() == 1 else None)
    timings, stream, launch = device_timings(watch, precisions, turns, tell)
    timings = timings.model_copy(update={"engine": engine_timings(watch, precisions, tell)})
    skeleton = Cluster(
        name="probed",
        gpus_per_node=len(nodes[0]),
        device=describe_device(device, timings, stream, launch, per_machine),
        tiers=tiers_of(device, len(nodes), len(nodes[0])),
    )
    links = list(_told(link_timings(watch, skeleton, rank), tell))
    together = [link.timings for link in links if not link.alone]
    fits = tuple(fit for index in range(len(skeleton.tiers)) if (fit := fit_tier(skeleton, index, together)))
    tell("outliers")
    outliers = (*slow_ranks(watch.each(reference_seconds(watch))), *slow_links(_measured_links(watch, nodes)))
    return Probe(_fitted(skeleton, fits, links), fits, _contention(links), outliers)


def _told(links: Iterator[LinkTimings], tell: Tell) -> Iterator[LinkTimings]:
    for link in links:
        tell(f"{link.timings.kind} over {link.axis}={link.size}")
        yield link


def _nodes(world: int) -> list[list[int]]:
    """Ranks by host, in order."""
    identities = _from_all(world, host_identity())
    nodes = [[rank for rank in range(world) if identities[rank] == host] for host in dict.fromkeys(identities)]
    if len({len(ranks) for ranks in nodes}) > 1 or [*chain.from_iterable(nodes)] != [*range(world)]:
        raise BadInput("start the probe with as many ranks on every node, numbered node by node")
    return nodes


def _from_all(world: int, mine: T) -> list[T]:
    """Every rank's own word, by rank."""
    words = [mine] * world
    dist.all_gather_object(words, mine)
    return words


def _fitted(skeleton: Cluster, fits: tuple[LinkFit, ...], links: list[LinkTimings]) -> Cluster:
    """The cluster with its tiers' fitted figures, for sizes and groups that were not measured, and the points."""
    by_tier = {fit.tier: fit for fit in fits}
    tiers = tuple(
        tier.model_copy(
            update={"latency_s": fit.latency_s, "bandwidth_bytes_per_s": fit.bytes_per_s, "efficiency": 1.0}
        )
        if (fit := by_tier.get(tier.name))
        else tier
        for tier in skeleton.tiers
    )
    points = {(t.kind, t.members, t.sharing): t for link in links if not link.alone for t in [link.timings]}
    return skeleton.model_copy(update={"tiers": tiers, "timings": tuple(points.values())})


def _contention(links: list[LinkTimings]) -> dict[str, float]:
    alone = {(link.axis, link.size): link.timings.seconds[-1] for link in links if link.alone}
    together = {
        (link.axis, link.size): link.timings.seconds[-1]
        for link in links
        if not link.alone and link.timings.kind == "all_reduce"
    }
    return {f"{axis}={size}": together[axis, size] / seconds for (axis, size), seconds in alone.items()}


def _measured_links(watch: Stopwatch, nodes: list[list[int]]) -> list[MeasuredLink]:
    """From node to node, by nodes; and from GPU to GPU inside them, by ranks."""
    cuda = watch.device.type == "cuda"
    nominal = _from_all(watch.world.size, network_bytes_per_s(infiniband=cuda))
    found = []
    for (source, target), rate in neighbour_rates(watch, [ranks[0] for ranks in nodes]).items():
        ends = [said for node in (source, target) if (said := nominal[nodes[node][0]])]
        found.append(MeasuredLink(f"node{source}-node{target}", rate, min(ends, default=None)))
    if cuda:
        inside = inside_bytes_per_s(watch.device, len(nodes[0]))
        for ranks in nodes:
            found += [
                MeasuredLink(f"rank{ranks[source]}-rank{ranks[target]}", rate, inside)
                for (source, target), rate in neighbour_rates(watch, ranks).items()
            ]
    return found


def slow_ranks(took: Sequence[float]) -> list[str]:
    """A sentence on every rank that needs clearly more than the median of the same product's seconds, by rank."""
    usual = statistics.median(took)
    return [
        f"rank {rank} is {seconds / usual - 1:.0%} slower at GEMM than the median"
        for rank, seconds in enumerate(took)
        if usual / seconds < _SLOW_RANK
    ]
