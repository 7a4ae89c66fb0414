"""What the claims about links measure: layouts trained for real in the lab, every result a file that is kept."""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import psutil

from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.cluster.units import parse_quantity
from triaxial.files import write_atomically
from triaxial.measure.compare import WARM_STEP
from triaxial.measure.lab import Lab
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import Layout, parse_layout
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training

NODES, RANKS = 2, 2
"""Ranks are on each node."""
UNSHAPED = "unshaped"
TIE = 0.05
"""Layouts whose medians lie closer than this are called equally fast."""
_LONG_S = 3.0
"""A step predicted to take longer is measured once instead of `_STEPS` times."""
_STEPS = 4
_QUIET, _TRIES = 0.1, 3
"""Cores that other programs may use beside a run; one that was disturbed more is tried again."""


@dataclass(frozen=True)
class Job:
    """Layouts that do the same work."""

    name: str
    sequences: int
    """A step."""
    seq_len: int
    layouts: Mapping[str, Layout]

    @property
    def training(self) -> Training:
        return Training(global_batch=self.sequences, seq_len=self.seq_len, precision="fp32")


def _layouts(**texts: str) -> dict[str, Layout]:
    return {name.replace("__", ", ").replace("_", " "): parse_layout(text) for name, text in texts.items()}


ONE_REPLICA = Job(
    "one sequence", 1, 1024,
    _layouts(
        tp_inside__pp_across="tp=2,pp=2,mb=1",
        pp_inside__tp_across="tp=2,pp=2,mb=1,order=pp-cp-dp-tp",
        tp_everywhere="tp=4,mb=1",
        pp_everywhere="pp=4,mb=1",
    ),
)  # fmt: skip
"""A single sequence leaves nothing to data parallelism: one replica needs all ranks."""
TWO_SEQUENCES = Job(
    "two sequences", 2, 1024,
    _layouts(
        tp_inside__pp_across="tp=2,pp=2,mb=1",
        pp_everywhere="pp=4,mb=1",
        tp_inside__dp_across="tp=2,dp=2,mb=1",
        pp_inside__dp_across="pp=2,dp=2,mb=1,order=pp-tp-cp-dp",
    ),
)  # fmt: skip


class Records:
    """Measurements by rate, job and layout; what a folder holds already is not measured again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def model_path(self) -> Path:
        """`tiny-byte` with eight layers, so that four stages are alike, and longer sequences."""
        import triaxial.model

        preset = json.loads((Path(triaxial.model.__file__).parent / "presets/tiny-byte.json").read_text())
        path = self._folder / "model.json"
        write_atomically(path, json.dumps(preset | {"num_hidden_layers": 8, "max_position_embeddings": 1024}))
        return path

    @cached_property
    def model(self) -> ModelSpec:
        return load_model_spec(self.model_path)

    def cluster(self, rate: str) -> Cluster:
        """What the probe says of the nodes at a rate."""
        path = self._folder / f"{NODES}x{RANKS}-{rate}.toml"
        for _ in range(0 if path.exists() else _TRIES):
            if self._undisturbed(rate, "probe", "--precision", "fp32", "--out", str(path)):
                break
        return load_cluster(path)

    def predicted(self, job: Job, cluster: Cluster, layout: Layout) -> float:
        """Seconds of a step."""
        return estimate(self.model, cluster, job.training, layout).step_time_s

    def measured(self, job: Job, rate: str, layout: Layout, expected_s: float) -> list[float]:
        """Seconds of every warm step."""
        path = self._folder / f"{NODES}x{RANKS}-{rate}-{job.name.replace(' ', '-')}-{layout}.json"
        for _ in range(0 if path.exists() else _TRIES):
            steps = WARM_STEP + (1 if expected_s > _LONG_S else _STEPS)
            sizes = ["--global-batch", str(job.sequences), "--seq-len", str(job.seq_len), "--steps", str(steps)]
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                data = ["--data", str(Path(os.__file__).parent), "--out", str(out)]
                arguments = ("train", str(self.model_path), *data, "--layout", str(layout), *sizes)
                undisturbed = self._undisturbed(rate, *arguments)
                records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
                seconds = [r["step_time_s"] for r in records if "loss" in r and r["step"] >= WARM_STEP]
            write_atomically(path, json.dumps(seconds))
            if undisturbed:
                break
        found: list[float] = json.loads(path.read_text())
        return found

    def _undisturbed(self, rate: str, *arguments: str) -> bool:
        """Run a command in the lab; whether other programs left the processors to it."""
        click.echo(f"{rate}: triaxial {' '.join(arguments)}", err=True)
        began, busy_s = time.monotonic(), _busy_s()
        with Lab(NODES, RANKS, bytes_per_s(rate)) as lab:
            lab.run(arguments, capture=True)
        others = (_busy_s() - busy_s) / (time.monotonic() - began)
        if others > _QUIET:
            click.echo(f"disturbed: other programs used {others:.2f} cores", err=True)
        return others <= _QUIET


def _busy_s() -> float:
    """Seconds of all cores so far, without those of this program's ended children."""
    cores, children = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return cores.user + cores.nice + cores.system - children.ru_utime - children.ru_stime


@dataclass(frozen=True)
class AtRate:
    """A job's layouts at one rate between the nodes, predicted from the probe at that rate."""

    rate: str
    cluster: Cluster
    predicted: dict[str, float]
    steps: dict[str, list[float]]
    """Seconds of every warm step."""

    @cached_property
    def measured(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.steps.items()}

    @property
    def best(self) -> str:
        return min(self.measured, key=self.measured.__getitem__)

    @property
    def winners(self) -> list[str]:
        """The fastest, and those that tie with it."""
        limit = self.measured[self.best] * (1 + TIE)
        return [name for name, seconds in self.measured.items() if seconds <= limit]

    @property
    def chosen(self) -> str:
        """The planner's."""
        return min(self.predicted, key=self.predicted.__getitem__)

    @property
    def regret(self) -> float:
        return self.measured[self.chosen] / self.measured[self.best] - 1


def at_rate(records: Records, job: Job, rate: str) -> AtRate:
    """Probe, then train every layout."""
    cluster = records.cluster(rate)
    predicted = {name: records.predicted(job, cluster, layout) for name, layout in job.layouts.items()}
    steps = {name: records.measured(job, rate, layout, predicted[name]) for name, layout in job.layouts.items()}
    return AtRate(rate, cluster, predicted, steps)


def bytes_per_s(rate: str) -> float | None:
    return None if rate == UNSHAPED else parse_quantity(rate, "bytes/s")
