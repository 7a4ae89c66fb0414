"""Published devices and well-known nodes (`catalog.toml`), found by name."""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from triaxial import BadInput
from triaxial.cluster.hardware import Device, LinkKind, Tier
from triaxial.cluster.units import BytesPerSecond


class Link(BaseModel):
    """A kind of link as published: rate of one link in one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LinkKind
    bandwidth_bytes_per_s: BytesPerSecond
    switch_reduces: bool = False
    source: str


class Network(BaseModel):
    """How a node reaches the others: its NICs and the rate of one in one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LinkKind
    nics: PositiveInt
    nic_bytes_per_s: BytesPerSecond


class NodeType(BaseModel):
    """A well-known server: its links from the inside out, and its network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    devices: tuple[str, ...]
    gpus: PositiveInt
    """Devices that the node (for a rack-scale NVLink domain: one tray of it) holds."""
    tiers: tuple[Tier, ...] = Field(min_length=1)
    network: Network
    source: str

    @property
    def rack_scale(self) -> bool:
        """Whether its links reach over several nodes, as an NVL72 rack's do."""
        return self.tiers[-1].ranks > self.gpus


class Catalog(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: dict[str, Device]
    aliases: dict[str, str]
    links: dict[str, Link]
    nodes: tuple[NodeType, ...]


@cache
def catalog() -> Catalog:
    """The catalogue that ships with the package."""
    raw = tomllib.loads((resources.files("triaxial.cluster") / "catalog.toml").read_text(encoding="utf-8"))
    return Catalog.model_validate(raw)


def find_device(name: str) -> Device:
    """A catalogue device by its name or an alias; case, spaces, - and _ do not matter.

    Raises:
        BadInput: no such device; the nearest names are offered.
    """
    known = catalog()
    by_key = {_key(alias): target for alias, target in known.aliases.items()} | {_key(n): n for n in known.devices}
    if _key(name) in by_key:
        return known.devices[by_key[_key(name)]]
    raise BadInput(_unknown("device", name, [*known.devices, *known.aliases]))


def find_link(name: str) -> Link:
    """A catalogue link by its name.

    Raises:
        BadInput: no such link; the nearest names are offered.
    """
    links = catalog().links
    if name.lower() in links:
        return links[name.lower()]
    raise BadInput(_unknown("link", name, list(links)))


def node_for(device: Device, gpus: int) -> NodeType:
    """The smallest well-known node that holds `gpus` of a device.

    Raises:
        BadInput: no node holds that many.
    """
    fitting = [node for node in catalog().nodes if device.name in node.devices]
    for node in sorted(fitting, key=lambda node: node.gpus):
        if gpus <= node.gpus:
            return node
    largest = max(node.gpus for node in fitting)
    raise BadInput(
        f"a {device.name} node holds at most {largest} GPUs, not {gpus}; describe another one in a TOML file"
    )


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _unknown(what: str, name: str, known: list[str]) -> str:
    names = {_key(entry): entry for entry in known}
    near = difflib.get_close_matches(_key(name), names, n=3, cutoff=0.5)
    offered = ", ".join(names[entry] for entry in near) if near else ", ".join(sorted(known))
    return f"unknown {what} {name!r}: {'did you mean' if near else 'known:'} {offered}{'?' if near else ''}"
