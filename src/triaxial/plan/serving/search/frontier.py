"""The frontier of latency and throughput: deployments that no other one beats in both, each simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.serving.demand import Demand
from triaxial.plan.serving.search.candidates import MAX_BATCHES, Screened

Floats = NDArray[np.float64]

POINTS = 10
OF_MOST = 0.9
"""Of the rate of a steady state, what chance arrivals leave without a growing queue."""


@dataclass(frozen=True)
class Point:
    """One deployment under one load, per replica."""

    layout: str
    """tp and pp."""
    max_batch: int
    chunk_tokens: int
    requests_per_s: float
    tokens_per_s_per_gpu: float
    ttft_s: float
    """Median."""
    tpot_s: float
    """Median."""
    latency_s: float
    """Mean."""


def frontier(screened: tuple[Screened, ...], demand: Demand) -> tuple[Point, ...]:
    """The best throughput per GPU for every latency, shortest latency first.

    Points are chosen in closed form over all candidates and loads, then simulated, and kept if none beats them still.
    """
    output = demand.mean_output
    latency = np.concatenate([one.table.ttft_s + output * one.table.tpot_s for one in screened])
    rate = np.concatenate([one.table.rate for one in screened]) * OF_MOST
    sequences = np.concatenate([one.table.sequences for one in screened])
    who = np.repeat(np.arange(len(screened)), [len(one.table.rate) for one in screened])
    gpus = np.array([one.candidate.replica_gpus for one in screened])[who]
    best = _undominated(latency, rate / gpus)
    spread = np.linspace(0, len(best) - 1, min(POINTS, len(best))).round().astype(int)
    points = [_simulated(screened[who[row]], float(rate[row]), float(sequences[row]), demand) for row in best[spread]]
    kept = _undominated(np.array([p.latency_s for p in points]), np.array([p.tokens_per_s_per_gpu for p in points]))
    return tuple(points[row] for row in kept)


def _undominated(latency: Floats, throughput: Floats) -> NDArray[np.intp]:
    """Rows in the order of latency, each with more throughput than all before it."""
    order = np.lexsort((-throughput, latency))
    highest = np.maximum.accumulate(throughput[order])
    kept: NDArray[np.intp] = order[np.concatenate([[True], highest[1:] > highest[:-1]])]
    return kept


def _simulated(one: Screened, rate: float, sequences: float, demand: Demand) -> Point:
    candidate, chunk = one.candidate, one.limits.chunk_tokens
    limits = candidate.limits(candidate.largest_batch(chunk, demand.longest) or MAX_BATCHES[0], chunk)
    served = candidate.serve(demand.arriving(rate, sequences), limits)
    ttft, tpot = served.at_percentile(50)
    return Point(
        layout=f"tp={candidate.layout.tp},pp={candidate.layout.pp}",
        max_batch=limits.max_batch,
        chunk_tokens=chunk,
        requests_per_s=rate,
        tokens_per_s_per_gpu=rate * demand.mean_output / candidate.replica_gpus,
        ttft_s=ttft,
        tpot_s=tpot,
        latency_s=float(served.latency_s.mean()),
    )
