"""The same cluster with more or less of one resource, or with fewer GPUs."""

from __future__ import annotations

from typing import Literal

from triaxial.cluster.hardware import NETWORK_LINKS
from triaxial.cluster.spec import Cluster, load_cluster

Resource = Literal["arithmetic", "memory bandwidth", "memory", "links inside a node", "network"]


def scaled(cluster: Cluster, resource: Resource, factor: float) -> Cluster:
    """`cluster` with `factor` times as much of a resource; arithmetic takes its power with it."""
    device = cluster.device
    if resource == "arithmetic":
        peaks = {precision: peak * factor for precision, peak in device.peak_flop_per_s.items()}
        device = device.model_copy(
            update={"peak_flop_per_s": peaks, "power_w": device.power_w and device.power_w * factor}
        )
    elif resource == "memory bandwidth":
        rate = device.memory_bandwidth_bytes_per_s * factor
        device = device.model_copy(update={"memory_bandwidth_bytes_per_s": rate})
    elif resource == "memory":
        device = device.model_copy(update={"memory_bytes": device.memory_bytes * factor})
    else:
        return _with_links(cluster, resource == "network", factor)
    return cluster.model_copy(update={"device": device})


def _with_links(cluster: Cluster, network: bool, factor: float) -> Cluster:
    """Other rates of the network's links, or of those inside nodes; and of what a probe has timed over them."""
    chosen = [index for index, tier in enumerate(cluster.tiers) if (tier.link in NETWORK_LINKS) == network]
    tiers = tuple(
        tier.model_copy(update={"bandwidth_bytes_per_s": tier.bandwidth_bytes_per_s * factor}) if i in chosen else tier
        for i, tier in enumerate(cluster.tiers)
    )
    timings = tuple(t.with_bandwidth(factor) if any(t.crosses(tier) for tier in chosen) else t for t in cluster.timings)
    return cluster.model_copy(update={"tiers": tiers, "timings": timings})


def has_network(cluster: Cluster) -> bool:
    return any(tier.link in NETWORK_LINKS for tier in cluster.tiers)


def smaller_clusters(cluster: Cluster) -> list[Cluster]:
    """`cluster` cut down to 1, 2, 4... GPUs of a node, then to 1, 2, 4... nodes, then itself; fewest first."""
    inside = [n for n in _doublings(cluster.gpus_per_node) if n < cluster.num_gpus]
    whole = [n * cluster.gpus_per_node for n in _doublings(cluster.num_nodes)]
    sizes = sorted({*inside, *whole, cluster.num_gpus})
    return [with_gpus(cluster, size) for size in sizes]


def with_gpus(cluster: Cluster, gpus: int) -> Cluster:
    """The cluster's first `gpus` devices, or a larger one of the same nodes.

    Raises:
        BadInput: more nodes than a cluster that has no network, of a device that the catalogue does not know.
    """
    if gpus == cluster.num_gpus:
        return cluster
    per_node = min(cluster.gpus_per_node, gpus)
    name = f"{gpus // per_node}x{per_node}x{cluster.device.name}"
    if gpus > cluster.num_gpus and not has_network(cluster):
        known = load_cluster(name)
        outer = tuple(tier for tier in known.tiers if tier.link in NETWORK_LINKS)
        tiers = (*cluster.tiers, *outer) if outer else known.tiers
    else:
        inner = (tier for tier in cluster.tiers[:-1] if tier.ranks < gpus and gpus % tier.ranks == 0)
        last = next((tier for tier in cluster.tiers if tier.ranks >= gpus), cluster.tiers[-1])
        tiers = (*inner, last.model_copy(update={"ranks": gpus}))
    return cluster.model_copy(update={"name": name, "tiers": tiers, "gpus_per_node": per_node})


def _doublings(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]
