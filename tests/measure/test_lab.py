"""The lab computes what one process does, over links as slow as they were asked to be, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from triaxial import BadInput
from triaxial.measure.lab import Lab
from triaxial.measure.namespaces import require_namespaces

try:
    require_namespaces()
except BadInput as refusal:
    pytest.skip(str(refusal), allow_module_level=True)

TRAIN = ("train", "tiny-byte", "--steps", "2", "--global-batch", "4", "--seq-len", "32", "--precision", "fp64")
RATE = 25e6
"""200 Mbit/s in bytes per second."""


@pytest.fixture(scope="module")
def lab():
    with Lab(2, 2, RATE) as open_lab:
        yield open_lab


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 40)
    return path


def namespaces() -> set[int]:
    """Network namespaces that some process is in."""
    found = set()
    for process in psutil.process_iter():
        with suppress(OSError):
            found.add(os.stat(f"/proc/{process.pid}/ns/net").st_ino)
    return found


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


def test_same_losses_across_namespaces(lab: Lab, data: Path, tmp_path: Path) -> None:
    job = [*TRAIN, "--data", str(data)]
    lab.run([*job, "--layout", "tp=2,pp=2,mb=2", "--out", str(tmp_path / "lab")], timeout_s=120)
    subprocess.run([sys.executable, "-m", "triaxial", *job, "--out", str(tmp_path / "one")], check=True, timeout=120)
    assert losses(tmp_path / "lab") == pytest.approx(losses(tmp_path / "one"), rel=1e-12)


def test_refusal_of_a_rank_is_the_jobs(lab: Lab, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the job failed on node"):
        lab.run([*TRAIN, "--data", str(data), "--layout", "tp=wide", "--out", str(tmp_path / "run")], timeout_s=120)
    assert not (tmp_path / "run").exists()


def test_links_are_as_slow_as_asked(lab: Lab) -> None:
    """Plain TCP between two nodes, by programs that know nothing of us; headers take 3 to 6 percent."""
    count, sender, receiver = 5_000_000, lab.command(0), lab.command(1)
    listen = "import socket; s=socket.create_server(('', 5000)); print(flush=True); c=s.accept()[0]\nwhile c.recv(1<<16): pass"
    send = f"import socket,sys; s=socket.create_connection((sys.argv[1], 5000)); s.sendall(bytes({count})); s.shutdown(1); s.recv(1)"
    with subprocess.Popen([*receiver, sys.executable, "-c", listen], stdout=subprocess.PIPE) as listener:
        listener.stdout.readline()
        began = time.monotonic()
        subprocess.run([*sender, sys.executable, "-c", send, lab.address(1)], check=True, timeout=60)
        seconds = time.monotonic() - began
    assert count / seconds < RATE
    assert count / seconds > RATE / 5  # even on a busy machine: unshaped it is a thousand times that


def test_nothing_is_left_of_a_killed_lab(data: Path, tmp_path: Path) -> None:
    before = namespaces()
    job = [*TRAIN, "--data", str(data), "--layout", "dp=4", "--steps", "100000", "--out", str(tmp_path / "run")]
    killed = subprocess.Popen([sys.executable, "-m", "triaxial", "lab", "--", *job], stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert killed.poll() is None
        time.sleep(0.1)
    assert len(namespaces() - before) == 3
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 30
    while namespaces() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert namespaces() <= before
