"""Latency and bandwidth of a tier of links, fitted to what its all-reduces took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from triaxial.cluster.spec import Cluster
from triaxial.cluster.timings import CollectiveTimings
from triaxial.plan.cost.timed import curve_seconds


@dataclass(frozen=True)
class LinkFit:
    """A tier as a latency per message and a rate per direction."""

    tier: str
    latency_s: float
    bytes_per_s: float
    median_error: float
    """Of the fit at the measured points, relative."""
    left_out_error: float
    """Median of what is predicted of a point from the others of its curve, relative: how the planner reads the points."""


def fit_tier(cluster: Cluster, index: int, timings: Sequence[CollectiveTimings]) -> LinkFit | None:
    """Fit seconds = 2 (n-1) latency + bytes 2 (n-1)/n / bandwidth, a ring's, with the least relative error.

    Taken are all-reduces that cross tier `index` alone; their groups share its links. None if there are none.
    """
    rows, seconds, curves = [], [], []
    for t in timings:
        ranks = t.members[-1]
        crosses = [t.crosses(i) for i in range(len(cluster.tiers))]
        if t.kind != "all_reduce" or crosses != [i == index for i in range(len(cluster.tiers))]:
            continue
        curves.append(t)
        sharing = t.sharing[index - 1] if index else 1.0
        for num_bytes, took in zip(t.bytes, t.seconds):
            rows.append((2.0 * (ranks - 1), num_bytes * sharing * 2 * (ranks - 1) / ranks))
            seconds.append(took)
    if not rows:
        return None
    measured = np.array(seconds)
    scaled = np.array(rows) / measured[:, None]
    latency, per_byte = np.maximum(np.linalg.lstsq(scaled, np.ones(len(rows)), rcond=None)[0], 1e-12)
    errors = np.abs(scaled @ (latency, per_byte) - 1)
    return LinkFit(
        cluster.tiers[index].name,
        float(latency),
        float(1 / per_byte),
        float(np.median(errors)),
        float(np.median(np.abs([*chain.from_iterable(map(left_out_errors, curves))] or [0.0]))),
    )


def left_out_errors(curve: CollectiveTimings) -> list[float]:
    """Relative errors at every size but the smallest and the largest, each predicted without its own point."""
    errors = []
    for place in range(1, len(curve.bytes) - 1):
        others = {
            "bytes": curve.bytes[:place] + curve.bytes[place + 1 :],
            "seconds": curve.seconds[:place] + curve.seconds[place + 1 :],
        }
        predicted = curve_seconds(curve.model_copy(update=others), np.asarray(float(curve.bytes[place])))
        errors.append(float(predicted) / curve.seconds[place] - 1)
    return errors
