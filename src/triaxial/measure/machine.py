"""What this machine is: its device and the tiers of links above it, as far as it can be known without measuring."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import psutil
import torch

from triaxial import BadInput
from triaxial.cluster.catalog import find_device, node_for
from triaxial.cluster.hardware import Device, LinkKind, Tier
from triaxial.cluster.timings import DeviceTimings

_UNKNOWN_RATE = 1.0
"""Until it is fitted."""


def describe_device(
    device: torch.device, timings: DeviceTimings, stream_bytes_per_s: float, launch_s: float, per_machine: int
) -> Device:
    """A device with its measured points, one of `per_machine` on one machine; peaks of a CPU are the fastest product
    that was measured."""
    versions = f"torch {torch.__version__}, Linux {platform.release()}"
    source = f"triaxial probe, {date.today():%Y-%m-%d}: {versions}, {per_machine} ranks on {os.cpu_count()} cores"
    measured = {"timings": timings, "launch_s": launch_s, "memory_efficiency": 1.0, "gemm_efficiency": 1.0}
    measured |= {"memory_bandwidth_bytes_per_s": stream_bytes_per_s, "source": source}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return _catalogued(name).model_copy(update={**measured, "name": name})
    fastest = {
        precision: max(2.0 * p.m * p.n * p.k / p.seconds for p in points) for precision, points in timings.gemm.items()
    }
    return Device(
        name=_cpu_name(),
        generation="cpu",
        peak_flop_per_s=fastest,
        memory_bytes=psutil.virtual_memory().total / per_machine,
        sm_count=1,
        **measured,
    )


def _catalogued(name: str) -> Device:
    """The published figures of a GPU by the name that its driver gives."""
    try:
        return find_device(name.removeprefix("NVIDIA ").replace(" 80GB HBM3", "-SXM"))
    except BadInput as error:
        raise BadInput(f"{error}: a device that the catalogue lacks cannot be probed yet") from None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def inside_bytes_per_s(device: torch.device, per_node: int) -> float:
    """Published rate of a GPU's links to those of its node, in one direction."""
    node = node_for(_catalogued(torch.cuda.get_device_name(device)), per_node)
    return node.tiers[0].bandwidth_bytes_per_s


def tiers_of(device: torch.device, nodes: int, per_node: int) -> tuple[Tier, ...]:
    """The ranks of a node under one tier, the nodes under another."""
    inside: LinkKind = "memory" if device.type == "cpu" else "nvlink4"
    tiers = [Tier(name="node", ranks=per_node, link=inside, bandwidth_bytes_per_s=_UNKNOWN_RATE)]
    if nodes > 1:
        network = Tier(name="network", ranks=nodes * per_node, link="ethernet", bandwidth_bytes_per_s=_UNKNOWN_RATE)
        tiers.append(network)
    return tuple(tier for tier in tiers if tier.ranks > 1) or tuple(tiers)
