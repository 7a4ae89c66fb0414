"""How far data parallelism scales: 1 to 8 replicas over links of several rates, rehearsed beside what is predicted.

    python bench/dp_scaling.py [--steps N] [--svg docs/measured/dp-scaling.svg]

Every replica is a process on a node of its own; computation is waited for, gradients are real messages, and time is
dilated (`triaxial rehearse`). Every replica has the same work, so ideal scaling is as many times the tokens per second.
Root and iproute2 needed.
"""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import click
import torch

from claims_picture import Line, lines_svg
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.files import write_atomically
from triaxial.measure.rehearsal import Rehearsal, rehearse
from triaxial.measure.script import write_script
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.search.what_if import scaled, with_gpus
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training

MODEL = "llama-3.2-1b"
CLUSTER = load_cluster("8x1xH100-SXM")
SHARES = (1.0, 1 / 4, 1 / 16)
"""Of the network's rate."""
REPLICAS = (2, 4, 8)
PER_REPLICA, SEQ_LEN, MICRO_BATCH = 16, 2048, 4


def work(dp: int) -> Training:
    return Training(global_batch=PER_REPLICA * dp, seq_len=SEQ_LEN)


def run(share: float, dp: int, steps: int) -> Rehearsal:
    """Rehearse `dp` replicas on as many nodes."""
    cluster = with_gpus(scaled(CLUSTER, "network", share), dp)
    return rehearse(write_script(load_model_spec(MODEL), cluster, work(dp), Layout(dp=dp, mb=MICRO_BATCH)), steps)


def gigabits(cluster: Cluster, share: float) -> str:
    return f"{cluster.tiers[-1].bandwidth_bytes_per_s * share * 8e-9:g} Gbit/s"


@click.command()
@click.option("--steps", default=1, show_default=True, help="of each case, after one to warm up")
@click.option("--svg", type=click.Path(path_type=Path), help="write a picture")
def main(steps: int, svg: Path | None) -> None:
    """Data-parallel scaling, rehearsed and predicted."""
    one_s = estimate(load_model_spec(MODEL), with_gpus(CLUSTER, 1), work(1), Layout(mb=MICRO_BATCH)).step_time_s
    print(
        f"`python bench/dp_scaling.py` on {date.today()}, {os.cpu_count()} cores, Linux {platform.release()}, torch "
        f"{torch.__version__}: {MODEL}, {PER_REPLICA} sequences of {SEQ_LEN:,} tokens a replica and step, H100s on a node "
        f"each. Tokens per second over those of one replica, whose step takes {one_s:.2f} s: rehearsed (predicted).\n"
    )
    names = [f"dp={dp}" for dp in REPLICAS]
    print(f"| between nodes | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    measured: dict[str, list[float]] = {name: [] for name in names}
    predicted: dict[str, list[float]] = {name: [] for name in names}
    rates = [gigabits(CLUSTER, share) for share in SHARES]
    for rate, share in zip(rates, SHARES):
        for name, dp in zip(names, REPLICAS):
            found = run(share, dp, steps)
            measured[name].append(dp * one_s / found.step_time_s)
            predicted[name].append(dp * one_s / found.script.predicted.step_time_s)
        cells = [f"{measured[name][-1]:.2f} ({predicted[name][-1]:.2f})" for name in names]
        print(f"| {rate} | {' | '.join(cells)} |", flush=True)
    if svg:
        lines = [Line(name, measured[name], predicted[name]) for name in names]
        write_atomically(svg, lines_svg("Tokens/s over one replica's", rates, lines))


if __name__ == "__main__":
    main()
