"""Runs `triaxial train` as a user does: a folder with a tiny model and text, and processes started in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

TRIAXIAL = (sys.executable, "-c", "from triaxial.cli import main; main()")
"""The `triaxial` command, wherever it is installed."""

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}
SEQ = 32
START_LIMIT_S = 150
"""For ranks to be training: they import torch, and the machine may be busy."""


class Workplace:
    """A folder with `config.json`, `data/` and a token cache of its own, and commands that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.json").write_text(json.dumps(MODEL))
        (folder / "data").mkdir()
        text = "\n".join(f"{i} squared is {i * i}." for i in range(120))
        (folder / "data" / "squares.txt").write_text(text)
        (folder / "empty").mkdir()
        self.cache = folder / "cache"

    def _environment(self, **more: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return inherited | {"XDG_CACHE_HOME": str(self.cache)} | more

    def run(
        self, *arguments: str, program: tuple[str, ...] = TRIAXIAL, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *arguments],
            cwd=self.folder, env=self._environment(**environment), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def train(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("train", "config.json", "--data", "data", "--seq-len", str(SEQ), *arguments, **environment)

    def start(self, out: str, *arguments: str) -> Running:
        """Begin a run that would go on for long."""
        command = ["train", "config.json", "--data", "data", "--seq-len", str(SEQ), "--steps", "1000000", "--out", out]
        process = subprocess.Popen(
            [*TRIAXIAL, *command, *arguments],
            cwd=self.folder, env=self._environment(), start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return Running(process, self.folder / out)

    def contents(self) -> set[str]:
        """Paths of all there is, but for the cache."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        return {str(path) for path in paths if path.parts[0] != self.cache.name}


class Running:
    """A run in progress. `ranks` are its processes by rank, once it trains."""

    def __init__(self, process: subprocess.Popen[str], out: Path) -> None:
        self.process, self.out = process, out
        self.ranks: dict[int, psutil.Process] = {}
        self._began_to_end = 0.0

    def wait_for_ranks(self, count: int) -> Running:
        """Until all ranks have been started, though they still load."""
        self._wait(lambda: len(psutil.Process(self.process.pid).children()) == count)
        self._find_ranks()
        return self

    def wait_for_steps(self, count: int = 2) -> Running:
        """Until the run has done some steps."""
        path = self.out / "metrics.jsonl"
        self._wait(lambda: path.exists() and path.read_text().count("\n") >= count)
        self._find_ranks()
        return self

    def _wait(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.05)

    def _find_ranks(self) -> None:
        children = psutil.Process(self.process.pid).children()
        self.ranks = {int(child.environ()["RANK"]): child for child in children}

    def signal(self, number: signal.Signals) -> None:
        """To the launcher alone."""
        self.process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """What a terminal does: SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, within_s: float) -> tuple[int, list[str]]:
        """Exit code and the lines on standard error, progress left out.

        Raises:
            AssertionError: not over in time, or a rank is left behind.
        """
        try:
            stderr = self.process.communicate(timeout=within_s)[1]
            _, alive = psutil.wait_procs(self.ranks.values(), timeout=5)
            assert not alive, f"left behind: {alive}"
        finally:
            for process in (self.process, *self.ranks.values()):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        lines = [line for line in stderr.splitlines() if line and not line.startswith("step ")]
        return self.process.returncode, lines


def read_metrics(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of steps, and of evaluations."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]
