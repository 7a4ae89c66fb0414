"""Costs of Triaxial's own engine where a probe has measured it: products of any shape from lines over their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from triaxial.cluster.hardware import Device
from triaxial.cluster.timings import EngineTimings, ProductTiming
from triaxial.plan.serving.engine import OURS, Engine

Seconds = npt.NDArray[np.float64]


def probed_engine(device: Device, engine: Engine) -> EngineTimings | None:
    """What a probe has measured of an engine: of ours alone."""
    return device.timings.engine if device.timings is not None and engine == OURS else None


def product_seconds(
    products: Sequence[ProductTiming], rows: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike
) -> Seconds:
    """Seconds of (rows, k) x (k, n): between two measured numbers of rows on the line through both, in doublings; beyond
    the largest as much longer as there are more rows."""
    rows, n, k = np.broadcast_arrays(*(np.asarray(size, dtype=float) for size in (rows, n, k)))
    known = np.array([product.rows for product in products], dtype=float)
    at = np.stack([product.call_s + n * k / product.weights_per_s for product in products], axis=-1)
    place = np.interp(np.log2(np.clip(rows, known[0], known[-1])), np.log2(known), np.arange(len(known)))
    below = np.minimum(place.astype(int), len(known) - 2)[..., None]
    low, high = (np.take_along_axis(np.log(at), index, axis=-1)[..., 0] for index in (below, below + 1))
    between = np.exp(low + (place - below[..., 0]) * (high - low))
    return np.asarray(between * np.maximum(1.0, rows / known[-1]))
