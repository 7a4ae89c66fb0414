"""A fabric: every rank is a network namespace of its own, with a shaped port into each tier of a cluster's links.

Which port a message takes follows from where its receiver lies, as in the cluster: routes lead to each other rank through
the innermost tier that both are under.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triaxial.measure.namespaces import Namespace, Switched

PORT = "port"
"""Name of a rank's interface into the innermost tier and, with a number, into the others; the first has its address."""
_PACKET_S = 0.5e-3
"""What one packet takes, within the sizes that a link can have: long ones cost less, short ones queue more finely."""
_PACKET_BYTES = (1500, 9000)
_ETHERNET_BYTES, _IP_AND_TCP_BYTES = 14, 52
"""Headers: outside a packet's size, and inside it."""
_QUEUE_BYTES = 64 << 20
"""Enough that a port never drops: senders wait instead."""


@dataclass(frozen=True)
class Port:
    """A rank's link into a tier, in each direction; its rate is that of payload."""

    ranks: int
    """Under one unit of the tier: those that it joins."""
    bytes_per_s: float


class Fabric(Switched):
    """Ranks' namespaces, which exist while the context is open."""

    def __init__(self, ranks: int, ports: Sequence[Port]) -> None:
        """`ports` of every rank, from the innermost tier to the outermost, which joins all ranks."""
        super().__init__(ranks)
        self._ports = ports

    def connect(self, switch: Namespace) -> None:
        switch.run("ip", "-batch", "-", given=self._links())
        for rank, namespace in enumerate(self.namespaces):
            namespace.run("ip", "-batch", "-", given=self._routes(rank))
            namespace.run("tc", "-batch", "-", given=self._rates())

    @property
    def paths(self) -> list[str]:
        """The namespace of every rank, as a file to enter it by."""
        return [namespace.path for namespace in self.namespaces]

    def _links(self) -> str:
        lines = []
        for tier in range(len(self._ports)):
            lines += [f"link add switch{tier} type bridge", f"link set switch{tier} up"]
            for rank, namespace in enumerate(self.namespaces):
                end = f"t{tier}r{rank}"
                mtu = _packet_bytes(self._ports[tier])
                lines += [
                    f"link add {end} mtu {mtu} type veth peer name {PORT}{tier} mtu {mtu} netns {namespace.pid}",
                    f"link set {end} master switch{tier} up",
                ]
        return "\n".join(lines)

    def _routes(self, rank: int) -> str:
        here = self.address(rank)
        lines = ["link set lo up", f"address add {here}/32 dev {PORT}0"]
        lines += [f"link set {PORT}{tier} up" for tier in range(len(self._ports))]
        for peer in range(self.count):
            if peer != rank:
                lines.append(f"route add {self.address(peer)}/32 dev {PORT}{self.tier_between(rank, peer)} src {here}")
        return "\n".join(lines)

    def tier_between(self, rank: int, peer: int) -> int:
        """The innermost tier that both are under."""
        return next(i for i, port in enumerate(self._ports) if rank // port.ranks == peer // port.ranks)

    def _rates(self) -> str:
        return "\n".join(
            f"qdisc replace dev {PORT}{tier} root tbf rate {_wire_bits_per_s(port)}bit "
            f"burst {2 * _packet_bytes(port)}b limit {_QUEUE_BYTES}b"
            for tier, port in enumerate(self._ports)
        )


def _packet_bytes(port: Port) -> int:
    smallest, largest = _PACKET_BYTES
    return round(min(max(port.bytes_per_s * _PACKET_S, smallest), largest))


def _wire_bits_per_s(port: Port) -> int:
    packet = _packet_bytes(port)
    return round(port.bytes_per_s * 8 * (packet + _ETHERNET_BYTES) / (packet - _IP_AND_TCP_BYTES))
