"""Costs of a cluster that has been probed: between its measured points by interpolation, beyond them by rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from triaxial.cluster.spec import Cluster
from triaxial.cluster.timings import AttentionTiming, CollectiveTimings, DeviceTimings, GemmTiming

Seconds = npt.NDArray[np.float64]

_NEIGHBOURS = 6
"""Measured points that a shape's rate is taken from."""
_NEAR = 0.05
"""Distance, in doublings, below which two shapes are alike; keeps the weight of an exact hit finite."""


def timed_gemm_seconds(
    points: Sequence[GemmTiming], m: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike, batch: npt.ArrayLike = 1
) -> Seconds:
    """Seconds of `batch` matrix products (m, k) x (k, n) at the rate of the most alike measured shapes."""
    shapes = np.array([(p.m, p.n, p.k) for p in points], dtype=float)
    rates = shapes.prod(axis=1) / np.array([p.seconds for p in points])
    m, n, k, batch = np.broadcast_arrays(*(np.asarray(size, dtype=float) for size in (m, n, k, batch)))
    return np.asarray(batch * m * n * k / _nearby_rate(shapes, rates, [m, n, k]))


def timed_attention_seconds(
    points: Sequence[AttentionTiming],
    *,
    batch: npt.ArrayLike,
    heads: npt.ArrayLike,
    queries: npt.ArrayLike,
    keys: npt.ArrayLike,
    head_dim: npt.ArrayLike,
    backward: bool,
) -> Seconds:
    """Seconds of one layer's causal attention core at the rate of the most alike measured shapes."""
    shapes = np.array([(p.sequences * p.heads, p.length, p.length, p.head_dim) for p in points], dtype=float)
    rates = shapes.prod(axis=1) / np.array([p.backward_s if backward else p.forward_s for p in points])
    b, h, q, s, d = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (batch, heads, queries, keys, head_dim)))
    return np.asarray(b * h * q * s * d / _nearby_rate(shapes, rates, [b * h, q, s, d]))


def _nearby_rate(shapes: Seconds, rates: Seconds, wanted: Sequence[Seconds]) -> Seconds:
    """Geometric mean of the rates at the nearest shapes, weighted by their closeness in doublings."""
    target = np.log2(np.maximum(np.stack(wanted, axis=-1), 1.0))
    apart = np.square(target[..., None, :] - np.log2(shapes)).sum(axis=-1) + _NEAR**2
    nearest = np.argsort(apart, axis=-1)[..., :_NEIGHBOURS]
    weight = 1 / np.take_along_axis(apart, nearest, axis=-1)
    return np.asarray(np.exp((weight * np.log(rates)[nearest]).sum(axis=-1) / weight.sum(axis=-1)))


def timed_pass_seconds(
    timings: DeviceTimings, bytes: npt.ArrayLike, kernels: npt.ArrayLike, precision: str, *, backward: bool = False
) -> Seconds:
    """Seconds of memory-bound work that moves `bytes` in `kernels` passes."""
    timed = timings.passes_in(precision, backward=backward)
    return np.asarray(np.asarray(kernels) * timed.launch_s + np.asarray(bytes, dtype=float) / timed.bytes_per_s)


def timed_collective_seconds(
    cluster: Cluster, kind: str, bytes: npt.ArrayLike, members: tuple[int, ...], sharing: tuple[float, ...]
) -> Seconds | None:
    """Seconds of a collective whose kind and group were measured; None where they were not.

    Of groups that lie alike, those are taken that shared their links with about as many others.
    """
    alike = [t for t in cluster.timings if t.kind == kind and t.members == members]
    if not alike:
        return None
    curve = min(alike, key=lambda t: sum(abs(np.log2(a / b)) for a, b in zip(t.sharing, sharing)))
    return curve_seconds(curve, np.asarray(bytes, dtype=float))


def curve_seconds(curve: CollectiveTimings, bytes: Seconds) -> Seconds:
    """Between two sizes on the line through both, as a latency and a rate make it; below the least as long as that,
    beyond the largest by its rate."""
    sizes, seconds = np.array(curve.bytes, dtype=float), np.array(curve.seconds)
    inside = np.interp(bytes, sizes, seconds)
    return np.asarray(np.where(bytes > sizes[-1], seconds[-1] * bytes / sizes[-1], inside))
