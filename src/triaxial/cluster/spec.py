"""`Cluster`: equal devices under tiers of links, from a short name (`4x8xH100-SXM`) or a TOML file."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from triaxial import BadInput
from triaxial.cluster.catalog import NodeType, find_device, find_link, node_for
from triaxial.cluster.hardware import NETWORK_LINKS, Device, Tier
from triaxial.cluster.timings import CollectiveTimings
from triaxial.cluster.units import parse_quantity

__all__ = ["Cluster", "Device", "Tier", "load_cluster", "to_toml"]


LOCAL, PROBED = "local", Path("cluster.toml")
"""The cluster that a probe has described, and the file in the current folder that it does so in."""


class Cluster(BaseModel):
    """Equal devices under tiers of links, innermost first; the last tier holds every device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    gpus_per_node: PositiveInt
    gpu_price_per_hour: PositiveFloat | None = None
    """What one device costs for an hour, in any currency."""
    device: Device
    tiers: tuple[Tier, ...] = Field(min_length=1)
    timings: tuple[CollectiveTimings, ...] = ()
    """Collectives that a probe has measured; they replace the formulas."""

    @model_validator(mode="after")
    def _tiers_nest(self) -> Cluster:
        for inner, outer in zip(self.tiers, self.tiers[1:]):
            if outer.ranks % inner.ranks or outer.ranks == inner.ranks:
                raise ValueError(
                    f"tier {outer.name!r} must hold a larger multiple of the {inner.ranks} ranks "
                    f"under {inner.name!r}, not {outer.ranks}"
                )
            if inner.link in NETWORK_LINKS and outer.link not in NETWORK_LINKS:
                raise ValueError(f"tier {outer.name!r} ({outer.link}) lies inside nodes: put it before {inner.name!r}")
        if self.num_gpus % self.gpus_per_node:
            raise ValueError(f"{self.num_gpus} ranks do not fill nodes of gpus_per_node={self.gpus_per_node}")
        return self

    @property
    def num_gpus(self) -> int:
        return self.tiers[-1].ranks

    @property
    def num_nodes(self) -> int:
        return self.num_gpus // self.gpus_per_node


def load_cluster(
    cluster: str | Path,
    *,
    inter: str | None = None,
    intra: str | None = None,
    gpu_price_per_hour: float | None = None,
) -> Cluster:
    """Read a cluster.

    Args:
        cluster: `NODESxGPUSxDEVICE`, `GPUSxDEVICE` (one node), a TOML file, or `local`: what `triaxial probe` found.
        inter: network between nodes: the rate of one NIC in one direction (`400Gb/s`; the node keeps its number of
            NICs), their number per node before it (`8x400Gb/s`) and the kind of network after it (`400Gb/s roce`).
        intra: links inside a node: a catalogue link that joins all its devices (`pcie4`, `nvlink4`), or the rate of
            one link in one direction (`300GB/s`; the node keeps its topology).
        gpu_price_per_hour: what one device costs for an hour.

    Raises:
        BadInput: unknown device or link, a rate that is no rate, or a file that describes no cluster.
    """
    path = PROBED if cluster == LOCAL else Path(cluster)
    if cluster == LOCAL and not path.is_file():
        raise BadInput(f"there is no {path} here: run `triaxial probe` first")
    from_file = path.suffix == ".toml" or path.is_file()
    found = _from_toml(path) if from_file else _from_name(str(cluster))
    if intra is not None:
        found = _with_intra(found, intra)
    if inter is not None:
        found = _with_inter(found, inter)
    if gpu_price_per_hour is not None:
        found = _validated({**found.model_dump(), "gpu_price_per_hour": gpu_price_per_hour}, found.name)
    return found


def _from_name(text: str) -> Cluster:
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\D.*)", text, re.IGNORECASE)
    if match is None:
        raise BadInput(f"no cluster {text!r}: write NODESxGPUSxDEVICE like 4x8xH100-SXM, or name a TOML file")
    nodes, gpus = int(match[1] or 1), int(match[2])
    if nodes < 1 or gpus < 1:
        raise BadInput(f"cluster {text!r}: nodes and GPUs per node must be at least 1")
    device = find_device(match[3])
    node = node_for(device, gpus)
    return Cluster(name=text, gpus_per_node=gpus, device=device, tiers=_tiers(node, nodes, gpus))


def _tiers(node: NodeType, nodes: int, gpus: int) -> tuple[Tier, ...]:
    """The node's own tiers cut to the devices asked for, and its network over them."""
    total = nodes * gpus
    domain = node.tiers[-1].ranks if node.rack_scale else gpus
    # racks that do not divide the job are given in equal parts: 128 GPUs of NVL72 racks are 2 x 64
    unit = max(size for size in range(gpus, min(domain, total) + 1, gpus) if total % size == 0)
    inside: list[Tier] = []
    for tier in node.tiers:
        if tier.ranks >= unit:
            inside.append(tier.model_copy(update={"ranks": unit}))
            break
        if unit % tier.ranks == 0:
            inside.append(tier)
    if total == unit:
        return tuple(inside)
    network = Tier(
        name="network",
        ranks=total,
        link=node.network.kind,
        bandwidth_bytes_per_s=node.network.nic_bytes_per_s,
        links=max(1.0, node.network.nics * unit / node.gpus),
    )
    return (*(tier for tier in inside if tier.ranks > 1), network)


def _with_inter(cluster: Cluster, text: str) -> Cluster:
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([0-9.]+\s*\S+)(?:\s+(\S+))?", text.strip())
    if match is None or match[1] == "0":
        raise BadInput(
            f"inter={text!r}: write the rate of one NIC like 400Gb/s, or NICs per node like '8x400Gb/s roce'"
        )
    kind = match[3]
    if kind is not None and kind not in NETWORK_LINKS:
        raise BadInput(f"inter={text!r}: a network is one of {', '.join(sorted(NETWORK_LINKS))}, not {kind!r}")
    inside, outer = _split(cluster)
    if not outer:
        raise BadInput(f"{cluster.name} has no network between its nodes: leave inter={text!r} out")
    update: dict[str, object] = {
        "bandwidth_bytes_per_s": _rate("inter", match[2]),
        "latency_s": None,
        "efficiency": None,
    }
    if kind:
        update["link"] = kind
    changed = [tier.model_copy(update=update) for tier in outer]
    if match[1]:
        nodes_below = (inside[-1].ranks if inside else 1) / cluster.gpus_per_node
        changed[0] = changed[0].model_copy(update={"links": max(1.0, int(match[1]) * nodes_below)})
    return cluster.model_copy(update={"tiers": (*inside, *changed)})


def _with_intra(cluster: Cluster, text: str) -> Cluster:
    inside, outer = _split(cluster)
    if not inside:
        raise BadInput(f"{cluster.name} has one device a node and so no links inside it: leave intra={text!r} out")
    if text[:1].isdigit():
        update = {"bandwidth_bytes_per_s": _rate("intra", text), "latency_s": None, "efficiency": None}
        inside = [tier.model_copy(update=update) for tier in inside]
    else:
        link = find_link(text)
        flat = Tier(
            name="node",
            ranks=inside[-1].ranks,
            link=link.kind,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            switch_reduces=link.switch_reduces,
        )
        inside = [flat]
    return cluster.model_copy(update={"tiers": (*inside, *outer)})


def _split(cluster: Cluster) -> tuple[list[Tier], list[Tier]]:
    """The tiers inside nodes and those between them."""
    inside = [tier for tier in cluster.tiers if tier.link not in NETWORK_LINKS]
    return inside, list(cluster.tiers[len(inside) :])


def _rate(what: str, text: str) -> float:
    try:
        rate = parse_quantity(text, "bytes/s")
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from None
    if not 0 < rate < float("inf"):
        raise BadInput(f"{what}: the rate {text!r} must be more than zero")
    return rate


def _from_toml(path: Path) -> Cluster:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise BadInput(f"cannot read cluster file {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not TOML ({error})") from None
    if isinstance(raw.get("device"), str):
        raw["device"] = find_device(raw["device"]).model_dump()
    return _validated({"name": path.stem, **raw}, str(path))


def _validated(raw: dict[str, Any], where: str) -> Cluster:
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        again = "; `triaxial probe` measures it again" if "timings" in first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"{where}: {field}{': ' if field else ''}{message}{again}") from None


def to_toml(cluster: Cluster) -> str:
    """The cluster as TOML text that `load_cluster` reads back as an equal one; numbers in SI units."""
    raw = cluster.model_dump(exclude_defaults=True)
    device, tiers = raw.pop("device"), raw.pop("tiers")
    tables = [("", raw), ("[device]", device), *(("[[tiers]]", tier) for tier in tiers)]
    return "\n".join(
        "\n".join(filter(None, [header, *(f"{key} = {_toml_value(value)}" for key, value in table.items())])) + "\n"
        for header, table in tables
    )


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
