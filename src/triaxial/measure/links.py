"""Links that give less than they should: against the rate that the system or the catalogue names, else against each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SLOW = 0.7
"""Share of what is expected below which a link is named."""
_SYSTEM = Path("/sys/class")
_BITS = 8


@dataclass(frozen=True)
class MeasuredLink:
    """One link in one direction, and what it is said to give."""

    name: str
    bytes_per_s: float
    nominal_bytes_per_s: float | None = None


def slow_links(links: Sequence[MeasuredLink]) -> list[str]:
    """A sentence on every slow link. One of unknown nominal rate is compared with the others, if it has two of them."""
    usual = statistics.median(link.bytes_per_s for link in links) if len(links) > 2 else None
    sentences = []
    for link in links:
        expected, what = link.nominal_bytes_per_s or usual, "its nominal" if link.nominal_bytes_per_s else "the median"
        if expected is not None and link.bytes_per_s / expected < _SLOW:
            sentences.append(f"link {link.name} gives {link.bytes_per_s / expected:.0%} of {what} rate")
    return sentences


def network_bytes_per_s(*, infiniband: bool, system: Path = _SYSTEM) -> float | None:
    """Nominal rate of this host's fastest network port in one direction; None if the system does not say.

    Args:
        infiniband: whether messages may take it.
        system: the kernel's account of devices (sysfs: `infiniband/*/ports/*/rate`, `net/*/speed`).
    """
    rates = _infiniband(system) if infiniband else []
    return max(rates or _interfaces(system), default=None)


def _infiniband(system: Path) -> list[float]:
    """Of active ports, whose files say `4: ACTIVE` and `400 Gb/sec (4X NDR)`."""
    rates = []
    for port in system.glob("infiniband/*/ports/*"):
        with suppress(OSError, ValueError):
            if "ACTIVE" in (port / "state").read_text():
                rates.append(float((port / "rate").read_text().split()[0]) * 1e9 / _BITS)
    return rates


def _interfaces(system: Path) -> list[float]:
    """Of interfaces with hardware, whose speed is in Mbit/s; what is virtual has no rate of its own, or says -1."""
    rates = []
    for interface in system.glob("net/*"):
        with suppress(OSError, ValueError):
            megabits = float((interface / "speed").read_text())
            if megabits > 0 and (interface / "device").exists():
                rates.append(megabits * 1e6 / _BITS)
    return rates
