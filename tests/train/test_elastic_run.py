"""A run under torchrun whose second node is killed and comes back: it goes on, and its numbers are those of one that
was never interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import pytest

from tests.command import SEQ, TRIAXIAL, Workplace, read_metrics

BOTH, ONE = "tp=1,pp=2,dp=1,mb=1", "tp=1,pp=1,dp=1,mb=1"
JOB = ("config.json", "--data", "data", "--seq-len", str(SEQ), "--precision", "fp64", "--lr", "1e-2",
       "--global-batch", "8", "--steps", "100000")  # fmt: skip
STEPS_BETWEEN = 6
LIMIT_S = 150
"""For what takes seconds on a machine that has nothing else to do."""


@dataclass
class Nodes:
    """torchrun's launchers, each in place of a node with one rank."""

    place: Workplace
    port: int
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        """The same command on every node; the first one holds the rendezvous."""
        conf = f"is_host={int(not self.launchers)},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
        command = (
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
            "--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}",
            "--rdzv-id", "run", "--rdzv-conf", conf, "--no-python", *TRIAXIAL,
            "train", *JOB, "--layout", "pp=2", "--checkpoint-every", "3", "--elastic", "--out", "run",
        )  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))  # one for each node, or they would spin in each other's way
        core = cores[len(self.launchers) % len(cores)]
        more = {"XDG_CACHE_HOME": str(self.place.cache), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launcher = subprocess.Popen(
            command, cwd=self.place.folder, env=os.environ | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        self.launchers.append(launcher)
        return launcher

    def steps_under(self, layout: str) -> int:
        """That are recorded since the run has this layout; 0 while it has another."""
        run = self.place.folder / "run"
        try:
            if json.loads((run / "settings.json").read_text())["layout"] != layout:
                return 0
            return len(read_metrics(run)[0])
        except (OSError, ValueError):  # not there yet, or just being replaced
            return 0

    def run_on(self, layout: str) -> int:
        """Wait until the run has this layout and has gone some steps with it. Returns the steps done in all."""
        deadline = time.monotonic() + LIMIT_S
        first = self._await(lambda: self.steps_under(layout), deadline)
        return self._await(lambda: (n := self.steps_under(layout)) >= first + STEPS_BETWEEN and n, deadline)

    def _await(self, steps: Callable[[], int], deadline: float) -> int:
        while not (found := steps()):
            assert time.monotonic() < deadline, "the run does not go on"
            assert self.launchers[0].poll() is None, "the first node has ended"
            time.sleep(0.05)
        return found

    def end(self) -> None:
        for launcher in self.launchers:
            launcher.send_signal(signal.SIGTERM)
        for launcher in self.launchers:
            launcher.wait(LIMIT_S)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = Nodes(Workplace(tmp_path_factory.mktemp("place")), port)
    yield nodes
    for launcher in nodes.launchers:
        launcher.kill()


def test_the_curve_is_the_uninterrupted_one_when_a_node_is_lost_and_comes_back(nodes: Nodes) -> None:
    nodes.start()
    second = nodes.start()
    before = nodes.run_on(BOTH)
    orphan = psutil.Process(second.pid).children()
    second.kill()
    assert not psutil.wait_procs(orphan, timeout=LIMIT_S)[1], "a rank outlives its killed launcher"
    alone = nodes.run_on(ONE)
    nodes.start()
    again = nodes.run_on(BOTH)
    nodes.end()
    assert before < alone < again

    steps = read_metrics(nodes.place.folder / "run")[0]
    assert [step["step"] for step in steps] == list(range(len(steps))), "a step is missing or is there twice"
    stop = ("--stop-after", str(len(steps)))
    done = nodes.place.run("train", *JOB, *stop, "--out", "uninterrupted", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    expected = read_metrics(nodes.place.folder / "uninterrupted")[0]
    for number in ("loss", "grad_norm"):
        np.testing.assert_allclose([s[number] for s in steps], [s[number] for s in expected], rtol=1e-9, atol=0)
