"""Costs of Triaxial's own engine where a probe has measured it: products of any shape from lines over their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from triaxial.cluster.hardware import Device
from triaxial.cluster.timings import EngineTimings, ProductTiming, ServerTimings
from triaxial.plan.serving.constants import HostTimes
from triaxial.plan.serving.engine import OURS, Engine

Seconds = npt.NDArray[np.float64]


def probed_engine(device: Device, engine: Engine) -> EngineTimings | None:
    """What a probe has measured of an engine: of ours alone."""
    return device.timings.engine if device.timings is not None and engine.host == OURS.host else None


def probed_host(timings: EngineTimings, engine: Engine, client: ServerTimings | None, *, crowded: bool) -> HostTimes:
    """The host of an engine whose ranks are processors.

    Server and client work for a step's tokens while the ranks are at the next one: on processors that are left, they
    only delay what they pass on. `crowded` is where none is left: they take theirs from a rank, for which the others wait.
    """
    beside = [one for one in (timings.server if engine.over_http else None, client) if one is not None]
    request_s = sum(one.request_s for one in beside)
    own = HostTimes(step_s=timings.step_s, sequence_s=timings.sequence_s, request_s=request_s)
    if not crowded:
        return own
    return replace(
        own,
        step_s=own.step_s + sum(one.step_s for one in beside),
        sequence_s=own.sequence_s + sum(one.sequence_s for one in beside),
        prompt_s=request_s,
    )


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
