"""The claims that the planner stands on, measured on a cluster of nodes made on this machine (root and iproute2 needed).

    python bench/claims.py --keep FOLDER [--rates 50mbit,200mbit,1gbit,4gbit,unshaped] [--out docs/measured]

Nodes are joined by links of each rate. At every rate the cluster is probed, the layouts are trained for real, and the
planner, given the probe alone, names its choice. Where the best layout changes between two rates, the rate at which it
does is bisected by measurement, and predicted from the probe at the faster of the two. FOLDER keeps every measurement:
a run that was stopped goes on where it was, and once all is there only the report is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from claims_lab import ONE_REPLICA, TWO_SEQUENCES, UNSHAPED, AtRate, Job, Records, at_rate, bytes_per_s
from claims_report import Flip, pictures, report
from triaxial.cluster.spec import Cluster
from triaxial.files import write_atomically
from triaxial.plan.search.what_if import scaled

_CLOSE_ENOUGH = 1.25
"""Ratio of the two rates between which a measured flip is known to lie."""


def flips(records: Records, job: Job, found: Sequence[AtRate]) -> Iterator[Flip]:
    """Every change of the best layout between two rates, slower first: one stays the best for as long as it ties."""
    below, slow = found[0].best, found[0].rate
    for fast in found[1:]:
        above, low, high = fast.best, bytes_per_s(slow), bytes_per_s(fast.rate)
        slow = fast.rate
        if below in fast.winners:
            continue
        if low is not None and high is not None:
            predicted = _predicted_flip(records, job, fast.cluster, below, above, high)
            yield Flip(below, above, _measured_flip(records, job, fast.cluster, below, above, low, high), predicted)
        below = above


def _measured_flip(
    records: Records, job: Job, cluster: Cluster, below: str, above: str, low: float, high: float
) -> float:
    """Rate at which one layout overtakes another between these two, by bisection."""
    while high / low > _CLOSE_ENOUGH:
        middle = math.sqrt(low * high)
        rate = f"{middle * 8e-6:.0f}mbit"
        found = {name: records.measured(job, rate, job.layouts[name], 0.0) for name in (below, above)}
        measured = AtRate(rate, cluster, {}, found).measured
        low, high = (middle, high) if measured[below] < measured[above] else (low, middle)
    return math.sqrt(low * high)


def _predicted_flip(records: Records, job: Job, cluster: Cluster, below: str, above: str, now: float) -> float | None:
    """Rate at which the planner, knowing the cluster at rate `now`, changes its mind; None if it does not."""

    def prefers_below(factor: float) -> bool:
        other = scaled(cluster, "network", factor)
        first, second = (records.predicted(job, other, job.layouts[name]) for name in (below, above))
        return first < second

    low, high = 1 / 64, 16.0
    if not prefers_below(low) or prefers_below(high):
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if prefers_below(middle) else (low, middle)
    return math.sqrt(low * high) * now


@click.command()
@click.option("--keep", type=click.Path(path_type=Path), required=True, help="Where measurements are, and are put.")
@click.option("--rates", default=f"50mbit,200mbit,1gbit,4gbit,{UNSHAPED}", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the report and its pictures there too.")
def main(keep: Path, rates: str, out: Path | None) -> None:
    """Measure what is missing, and print the report."""
    records = Records(keep)
    one, two = ([at_rate(records, job, rate) for rate in rates.split(",")] for job in (ONE_REPLICA, TWO_SEQUENCES))
    text = report(one, two, list(flips(records, TWO_SEQUENCES, two)))
    click.echo(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "claims-links.md", text)
        for name, picture in pictures(one, two).items():
            write_atomically(out / f"{name}.svg", picture)


if __name__ == "__main__":
    main()
