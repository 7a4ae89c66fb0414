"""The lab: a cluster of nodes on one machine, each a network namespace, joined by shaped virtual links."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from triaxial import BadInput, NoAnswer
from triaxial.measure.namespaces import Namespace, Switched

_LINK = "eth0"
_PORT = 29400
"""Of the rendezvous on the first node; the namespace is ours alone, so any port is free."""
_QUEUE_S = 0.05
"""The most that a packet waits in a shaped link's queue before it is dropped."""
_TICK_S = 1 / 250
"""A token bucket must hold what the link carries between two of the kernel's timer ticks (tc-tbf(8))."""
_SMALLEST_BURST_BYTES = 32 << 10
_POLL_S = 0.2
_SETTLE_S = 15.0
"""That launchers have to end by themselves after one has failed."""


class Lab(Switched):
    """Nodes that exist while the context is open.

    Attributes:
        nodes: how many.
        ranks_per_node: processes that `run` starts on each.
        between_bytes_per_s: rate of a node's link in each direction; None leaves it as fast as the kernel is.
    """

    def __init__(self, nodes: int, ranks_per_node: int, between_bytes_per_s: float | None = None) -> None:
        self.nodes, self.ranks_per_node = nodes, ranks_per_node
        self.between_bytes_per_s = between_bytes_per_s
        super().__init__(nodes)

    def connect(self, switch: Namespace) -> None:
        switch.run("ip", "link", "add", "switch", "type", "bridge")
        switch.run("ip", "link", "set", "switch", "up")
        for index, node in enumerate(self.namespaces):
            self._join(switch, node, index)
        self.shape(self.between_bytes_per_s)

    def _join(self, switch: Namespace, node: Namespace, index: int) -> None:
        port = f"node{index}"
        switch.run("ip", "link", "add", port, "type", "veth", "peer", "name", _LINK, "netns", str(node.pid))
        switch.run("ip", "link", "set", port, "master", "switch", "up")
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "address", "add", f"{self.address(index)}/16", "dev", _LINK)
        node.run("ip", "link", "set", _LINK, "up")

    def shape(self, between_bytes_per_s: float | None) -> None:
        """Give every node's link another rate in each direction."""
        self.between_bytes_per_s = between_bytes_per_s
        for node in self.namespaces:
            if between_bytes_per_s is None:
                node.run("tc", "qdisc", "replace", "dev", _LINK, "root", "pfifo")
                continue
            burst = max(_SMALLEST_BURST_BYTES, round(between_bytes_per_s * _TICK_S))
            rate = ("rate", f"{round(between_bytes_per_s * 8)}bit", "burst", f"{burst}b", "latency", f"{_QUEUE_S}s")
            node.run("tc", "qdisc", "replace", "dev", _LINK, "root", "tbf", *rate)

    def run(self, arguments: Sequence[str], *, timeout_s: float | None = None, capture: bool = False) -> str:
        """Run `triaxial ARGUMENTS` as one job under a launcher on every node.

        Args:
            timeout_s: end the job after so long; None waits.
            capture: return what rank 0 prints instead of printing it.

        Raises:
            BadInput, NoAnswer: a rank failed, for the reason it has given, or the job took too long.
        """
        launchers = [self._launch(index, arguments, capture) for index in range(self.nodes)]
        try:
            return _finish(launchers, timeout_s)
        finally:
            for launcher in launchers:
                launcher.kill()
                launcher.wait()

    def command(self, node: int) -> list[str]:
        """What to write before a command to run it on a node, to be killed if this process is."""
        return ["setpriv", "--pdeathsig", "KILL", *self.namespaces[node].enter]

    def _launch(self, index: int, arguments: Sequence[str], capture: bool) -> subprocess.Popen[str]:
        node = {
            "ranks": self.ranks_per_node,
            "nodes": self.nodes,
            "index": index,
            "address": self.address(index),
            "rendezvous": f"{self.address(0)}:{_PORT}",
        }
        return subprocess.Popen(
            [*self.command(index), sys.executable, "-m", "triaxial.measure.lab_node", json.dumps(node), *arguments],
            env=os.environ | {"GLOO_SOCKET_IFNAME": _LINK, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.PIPE if index else None,
            text=True,
        )


def _finish(launchers: list[subprocess.Popen[str]], timeout_s: float | None) -> str:
    """Wait for every launcher; once one has failed, the others get a short while to end by themselves."""
    said = dict.fromkeys(range(len(launchers)), ("", ""))
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    failed: list[int] = []
    running = list(said)
    while running and time.monotonic() < deadline:
        for node in running:
            with suppress(subprocess.TimeoutExpired):
                said[node] = launchers[node].communicate(timeout=_POLL_S)
                if launchers[node].returncode:
                    failed.append(node)
                    deadline = min(deadline, time.monotonic() + _SETTLE_S)
        running = [node for node in running if launchers[node].returncode is None]
    if failed:
        first = failed[0]
        words = (said[first][1] or "").strip().removeprefix("triaxial: ").splitlines()
        kind = BadInput if launchers[first].returncode == 2 else NoAnswer
        raise kind(f"the job failed on node {first}" + (f": {words[-1]}" if words else ""))
    if running:
        raise NoAnswer(f"the job was not done after {timeout_s:g} s")
    return "".join(out or "" for out, _ in said.values())
