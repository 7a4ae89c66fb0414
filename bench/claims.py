"""The claims that the planner stands on, measured on a cluster of nodes made on this machine (root and iproute2 needed).

    python bench/claims.py [--rates 50mbit,200mbit,1gbit,4gbit,unshaped] [--steps N] [--markdown docs/measured/claims.md]

Two nodes of two ranks are joined by links of each rate. At every rate the cluster is probed, the layouts are trained for
real, and the planner, given the probe alone, names its choice. Where the best layout changes between two rates, the rate
at which it does is bisected by measurement, and predicted from the probe at the faster of the two.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count, pairwise
from pathlib import Path

import click
import torch

from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.cluster.units import parse_quantity
from triaxial.files import write_atomically
from triaxial.measure.compare import Comparison, compare_run
from triaxial.measure.lab import Lab
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout, parse_layout
from triaxial.plan.search.what_if import scaled
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training

MODEL, NODES, RANKS = "tiny-byte", 2, 2
WORK = Training(global_batch=16, seq_len=128, precision="fp32")
NAMES = {
    "tp inside, pp across": "tp=2,pp=2,mb=2",
    "pp inside, tp across": "tp=2,pp=2,mb=2,order=pp-cp-dp-tp",
    "tp inside, dp across": "tp=2,dp=2,mb=8",
    "pp inside, dp across": "pp=2,dp=2,mb=2,order=pp-tp-cp-dp",
    "tp everywhere": "tp=4,mb=16",
    "pp everywhere": "pp=4,mb=2",
    "dp everywhere": "dp=4,mb=4",
}
LAYOUTS = {name: parse_layout(text) for name, text in NAMES.items()}
CLOSE_ENOUGH = 1.25
"""Ratio of the two rates between which a measured flip is known to lie."""


@dataclass(frozen=True)
class AtRate:
    """Every layout at one rate between the nodes."""

    rate: str
    cluster: Cluster
    runs: dict[str, Comparison]

    @property
    def best(self) -> str:
        return min(self.runs, key=lambda name: self.runs[name].measured.step_time_s)

    @property
    def chosen(self) -> str:
        return min(self.runs, key=lambda name: self.runs[name].predicted.step_time_s)

    @property
    def regret(self) -> float:
        return self.runs[self.chosen].measured.step_time_s / self.runs[self.best].measured.step_time_s - 1


@dataclass(frozen=True)
class Flip:
    """Where one layout stops being faster than another."""

    below: str
    above: str
    measured_bytes_per_s: float
    predicted_bytes_per_s: float | None

    @property
    def factor(self) -> float:
        """How far the prediction is off, as a ratio of at least 1."""
        if self.predicted_bytes_per_s is None:
            return math.inf
        ratio = self.predicted_bytes_per_s / self.measured_bytes_per_s
        return max(ratio, 1 / ratio)


class Bench:
    """Runs layouts in the lab, each into a folder of its own."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps, self._number = folder, steps, count()

    def probe(self, lab: Lab) -> Cluster:
        out = self._next() / "cluster.toml"
        lab.run(["probe", "--precision", "fp32", "--out", str(out)], capture=True)
        return load_cluster(out)

    def train(self, lab: Lab, layout: Layout, cluster: Cluster) -> Comparison:
        out = self._next() / "run"
        sizes = ["--global-batch", str(WORK.global_batch), "--seq-len", str(WORK.seq_len), "--steps", str(self._steps)]
        data = Path(os.__file__).parent
        lab.run(["train", MODEL, "--data", str(data), "--layout", str(layout), *sizes, "--out", str(out)], capture=True)
        return compare_run(out, cluster)

    def _next(self) -> Path:
        folder = self._folder / str(next(self._number))
        folder.mkdir()
        return folder


def at_rate(bench: Bench, rate: str) -> AtRate:
    """Probe, then train every layout."""
    with Lab(NODES, RANKS, _bytes_per_s(rate)) as lab:
        cluster = bench.probe(lab)
        runs = {}
        for name, layout in LAYOUTS.items():
            click.echo(f"{rate}: {name}", err=True)
            runs[name] = bench.train(lab, layout, cluster)
    return AtRate(rate, cluster, runs)


def flips(bench: Bench, found: Sequence[AtRate]) -> Iterator[Flip]:
    """Every change of the best layout between two neighbouring rates, slower first."""
    for slow, fast in pairwise(found):
        if slow.best == fast.best or _bytes_per_s(fast.rate) is None:
            continue
        low, high = _bytes_per_s(slow.rate), _bytes_per_s(fast.rate)
        assert low is not None
        assert high is not None
        predicted = _predicted_flip(fast.cluster, slow.best, fast.best, high, low)
        with Lab(NODES, RANKS) as lab:
            while high / low > CLOSE_ENOUGH:
                middle = math.sqrt(low * high)
                click.echo(f"flip between {low * 8e-6:.0f} and {high * 8e-6:.0f} Mbit/s", err=True)
                lab.shape(middle)
                below, above = (bench.train(lab, LAYOUTS[name], fast.cluster) for name in (slow.best, fast.best))
                if below.measured.step_time_s < above.measured.step_time_s:
                    low = middle
                else:
                    high = middle
        yield Flip(slow.best, fast.best, math.sqrt(low * high), predicted)


def _predicted_flip(cluster: Cluster, below: str, above: str, now: float, least: float) -> float | None:
    """Rate down to `least` / 4 at which the planner, knowing the cluster at rate `now`, changes its mind."""
    spec = load_model_spec(MODEL)

    def prefers_below(factor: float) -> bool:
        other = scaled(cluster, "network", factor)
        first, second = (estimate(spec, other, WORK, LAYOUTS[name]).step_time_s for name in (below, above))
        return first < second

    low, high = least / now / 4, 4.0
    if not prefers_below(low) or prefers_below(high):
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if prefers_below(middle) else (low, middle)
    return math.sqrt(low * high) * now


def _bytes_per_s(rate: str) -> float | None:
    return None if rate == "unshaped" else parse_quantity(rate, "bytes/s")


def report(found: Sequence[AtRate], changes: Sequence[Flip], steps: int) -> str:
    """The tables as Markdown."""
    headings = [*LAYOUTS, "planner's choice", "regret"]
    lines = [
        "## Which layout wins depends on the links",
        "",
        f"`python bench/claims.py --steps {steps}` on {date.today():%Y-%m-%d}, {os.cpu_count()} cores, "
        f"Linux {platform.release()}, torch {torch.__version__}. `{MODEL}`, {WORK.global_batch} sequences of "
        f"{WORK.seq_len} tokens a step in fp32, {NODES} nodes of {RANKS} ranks. Seconds a step, measured "
        "(predicted from the probe at that rate); the fastest in bold.",
        "",
        "| between nodes | " + " | ".join(headings) + " |",
        "|---|" + "---:|" * len(LAYOUTS) + "---|---:|",
    ]
    for row in found:
        cells = []
        for name, run in row.runs.items():
            text = f"{run.measured.step_time_s:.2f}"
            cells.append((f"**{text}**" if name == row.best else text) + f" ({run.predicted.step_time_s:.2f})")
        lines.append(f"| {row.rate} | " + " | ".join([*cells, row.chosen, f"{row.regret:.0%}"]) + " |")
    errors = sorted(abs(run.error) for row in found for run in row.runs.values())
    lines += ["", f"Median error of the {len(errors)} predictions: {errors[len(errors) // 2]:.0%}.", ""]
    for change in changes:
        predicted = change.predicted_bytes_per_s
        expected = (
            "not at all" if predicted is None else f"at {predicted * 8e-6:.0f} Mbit/s ({change.factor:.2f} x off)"
        )
        lines.append(
            f"- From *{change.below}* to *{change.above}*: measured at {change.measured_bytes_per_s * 8e-6:.0f} Mbit/s, "
            f"predicted {expected}."
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rates", default="50mbit,200mbit,1gbit,4gbit,unshaped", show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables there too.")
def main(rates: str, steps: int, markdown: Path | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="triaxial-claims-") as folder:
        bench = Bench(Path(folder), steps)
        found = [at_rate(bench, rate) for rate in rates.split(",")]
        text = report(found, list(flips(bench, found)), steps)
    click.echo(text)
    if markdown:
        write_atomically(markdown, "# The claims\n\n" + text)


if __name__ == "__main__":
    main()
