"""What one device's work costs: matrix products, attention and memory-bound passes, in seconds, over arrays of shapes.

A roofline with measured behaviour. Sizes count elements and may be arrays of any shapes that broadcast.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from triaxial.cluster.hardware import BYTES_PER_ELEMENT, Device, Precision
from triaxial.plan.cost.constants import COMPUTE, ComputeConstants
from triaxial.plan.cost.timed import timed_attention_seconds, timed_gemm_seconds

Seconds = npt.NDArray[np.float64]

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Shapes (rows, columns) of the piece of the result that one multiprocessor makes, as GEMM libraries offer them."""
SPLITS = (1, 2, 4, 8)
"""Pieces that the summed dimension k may be cut into, so that a small result still fills the device."""
NARROW: frozenset[Precision] = frozenset({"fp8", "int8", "fp4", "int4"})

_HIGHEST_SHARE = 0.95
"""No measured product sustains more of its dense peak, however much power the device may draw."""
_OVERLAP = 4.0
"""Arithmetic and memory traffic of a kernel combine as (a^4 + b^4)^(1/4): the longer one, and some of the shorter
where they are alike."""
_FLASH_BLOCK = 128
"""Queries and keys that a fused attention kernel takes at a time (arXiv 2307.08691, section 3)."""


def launch_seconds(device: Device, constants: ComputeConstants = COMPUTE) -> float:
    """Seconds of the smallest kernel: below it no work makes a difference."""
    if device.launch_s is not None:
        return device.launch_s
    return constants.generations[device.generation].launch_s


def sustained_flop_per_s(device: Device, precision: Precision, constants: ComputeConstants = COMPUTE) -> float:
    """FLOP/s that a large matrix product holds.

    A device with less power per peak FLOP than its generation's reference runs at a lower clock: power grows with
    the cube of the clock (frequency times voltage squared), so the clock goes with the cube root of the power.

    Raises:
        BadInput: the device has no units for the precision.
    """
    peak = device.peak(precision)
    figures = constants.generations[device.generation]
    reference = figures.narrow if precision in NARROW else figures.wide
    if device.gemm_efficiency is not None:
        return peak * device.gemm_efficiency * reference / figures.wide
    assert device.power_w is not None, "every catalogued device has a power limit"
    power = device.power_w / (device.peak("fp16") / 1e12) / figures.reference_w_per_tflop
    return float(peak * min(_HIGHEST_SHARE, reference * power ** (1 / 3)))


def memory_bytes_per_s(device: Device, constants: ComputeConstants = COMPUTE) -> float:
    """Bytes per second of a long stream from or to device memory."""
    share = device.memory_efficiency or constants.generations[device.generation].memory
    return device.memory_bandwidth_bytes_per_s * share


def pass_seconds(device: Device, bytes: npt.ArrayLike, constants: ComputeConstants = COMPUTE) -> Seconds:
    """Seconds of one memory-bound pass (norm, activation, optimizer) that reads and writes `bytes` in all."""
    moved = np.asarray(bytes, dtype=np.float64) / memory_bytes_per_s(device, constants)
    return launch_seconds(device, constants) + moved


def gemm_seconds(
    device: Device,
    m: npt.ArrayLike,
    n: npt.ArrayLike,
    k: npt.ArrayLike,
    precision: Precision,
    batch: npt.ArrayLike = 1,
    constants: ComputeConstants = COMPUTE,
    weight_bytes: float | None = None,
    result_bytes: float | None = None,
) -> Seconds:
    """Seconds of one launch of `batch` matrix products (m, k) x (k, n).

    The result is cut into tiles, which the multiprocessors take in waves; k may be split over several of them, whose
    fp32 parts are then added up through memory. The best choice of tile and split is taken, as GEMM libraries do.
    The weight comes from memory: a model's next layer has long driven it out of the cache. A product in 8 or 4 bits
    includes the cast of its (m, k) input from 16 bits; results have 16 bits.

    Args:
        weight_bytes: bytes per element of the (k, n) weight where it is stored narrower than it is multiplied.
        result_bytes: bytes moved per element of the result where it is more than written in the products' precision.

    Raises:
        BadInput: the device has no units for the precision.
    """
    if device.timings is not None:
        return timed_gemm_seconds(device.timings.gemm_in(precision), m, n, k, batch)
    m, n, k, batch = np.broadcast_arrays(*(np.asarray(size, dtype=np.float64) for size in (m, n, k, batch)))
    stream = memory_bytes_per_s(device, constants)
    multiprocessor = sustained_flop_per_s(device, precision, constants) / device.sm_count
    element = BYTES_PER_ELEMENT[precision]
    stored = element if weight_bytes is None else weight_bytes
    written = max(element, 2.0) if result_bytes is None else result_bytes
    operands = batch * (element * m * k + stored * k * n + written * m * n) / stream
    one_partial = 8.0 * batch * m * n / stream  # a float32 written and read back
    best = np.full(m.shape, np.inf)
    for split in SPLITS:
        arithmetic = np.full(m.shape, np.inf)
        for rows, columns in TILES:
            tiles = batch * np.ceil(m / rows) * np.ceil(n / columns)
            rate = multiprocessor * _tile_share(rows, columns, constants)
            per_tile = 2 * rows * columns * (k / split + constants.ramp_k) / rate
            waves = _waves(tiles * split / device.sm_count, constants.tail)
            arithmetic = np.minimum(arithmetic, waves * per_tile)
        traffic = operands + (one_partial * split if split > 1 else 0.0)
        best = np.minimum(best, arithmetic**_OVERLAP + traffic**_OVERLAP)
    seconds = launch_seconds(device, constants) + best ** (1 / _OVERLAP)
    if precision in NARROW:
        seconds = seconds + constants.cast_launch_s + constants.cast_bytes * batch * m * k / stream
    return np.asarray(seconds)


def _tile_share(rows: int, columns: int, constants: ComputeConstants) -> float:
    """Rate of a tile against the largest one's."""
    largest_rows, largest_columns = TILES[0]
    largest = 1 + constants.tile_traffic * (1 / largest_rows + 1 / largest_columns)
    return largest / (1 + constants.tile_traffic * (1 / rows + 1 / columns))


def _waves(filled: Seconds, tail: float) -> Seconds:
    """Waves that tiles for `filled` whole devices take: at least one, the last one partly lost."""
    return np.maximum(1.0, filled + tail * (np.ceil(filled) - filled))


def attention_seconds(
    device: Device,
    *,
    batch: npt.ArrayLike,
    heads: npt.ArrayLike,
    kv_heads: npt.ArrayLike,
    queries: npt.ArrayLike,
    keys: npt.ArrayLike,
    head_dim: npt.ArrayLike,
    precision: Precision,
    backward: bool = False,
    causal: bool = True,
    flash: bool = True,
    kernels: npt.ArrayLike = 1,
    constants: ComputeConstants = COMPUTE,
) -> Seconds:
    """Seconds of one layer's attention core on one device: scores, softmax and weighted values, no projections.

    Args:
        heads: query heads on this device; `kv_heads` key-value heads.
        queries: queries per sequence; `keys` the keys they see. Causal queries are the last of them.
        backward: the gradient; a fused kernel computes the scores again (5 products against 2).
        flash: one fused kernel (arXiv 2205.14135) instead of products and a softmax through memory.
        kernels: fused kernels that each take all queries and a part of the keys (ring attention).

    Raises:
        BadInput: the device has no units for the precision.
    """
    if device.timings is not None:
        return timed_attention_seconds(
            device.timings.attention_in(precision),
            batch=batch,
            heads=heads,
            queries=queries,
            keys=keys,
            head_dim=head_dim,
            backward=backward,
        )
    b, h, g, q, s, d = (np.asarray(x, dtype=np.float64) for x in (batch, heads, kv_heads, queries, keys, head_dim))
    if not flash:
        return _unfused_attention_seconds(device, b * h, q, s, d, precision, backward, constants)
    products = 5 if backward else 2
    softmax = constants.generations[device.generation].flash_head_dim
    rate = sustained_flop_per_s(device, precision, constants) * d / (d + softmax)
    if backward:
        rate = rate * constants.flash_backward
    seen = _causal_keys(q, s) if causal else s
    # a multiprocessor takes a block of queries of one head, or, where there are too few of these, a piece of its keys
    blocks = b * h * np.ceil(q / _FLASH_BLOCK)
    pieces = np.clip(device.sm_count / blocks, 1.0, np.maximum(1.0, s / _FLASH_BLOCK))
    busy = np.minimum(1.0, blocks * pieces / device.sm_count)
    launches = np.asarray(kernels, dtype=np.float64)
    started = seen + constants.flash_ramp_keys * products / 2 * pieces * launches
    arithmetic = products * 2 * b * h * q * started * d / (rate * busy)
    tensors = b * d * (2 * h * q + 2 * g * s) * (2 if backward else 1)  # q, k, v, output, and their gradients
    traffic = BYTES_PER_ELEMENT[precision] * tensors / memory_bytes_per_s(device, constants)
    busy_s = (arithmetic**_OVERLAP + traffic**_OVERLAP) ** (1 / _OVERLAP)
    return np.asarray(launches * launch_seconds(device, constants) + busy_s)


def _causal_keys(queries: Seconds, keys: Seconds) -> Seconds:
    """Keys that a causal query is multiplied with on average: whole blocks up to the diagonal."""
    hidden = np.minimum(queries, keys) / 2
    return np.asarray(np.maximum(np.minimum(keys, _FLASH_BLOCK), keys - hidden + np.minimum(_FLASH_BLOCK, queries) / 2))


def _unfused_attention_seconds(
    device: Device,
    matrices: Seconds,
    queries: Seconds,
    keys: Seconds,
    head_dim: Seconds,
    precision: Precision,
    backward: bool,
    constants: ComputeConstants,
) -> Seconds:
    """Every score goes through memory, and causal masking saves nothing (Megatron's kernels before fused attention)."""
    scores = gemm_seconds(device, queries, keys, head_dim, precision, batch=matrices, constants=constants)
    values = gemm_seconds(device, queries, head_dim, keys, precision, batch=matrices, constants=constants)
    # forward: read and write; backward: read the probabilities and their gradient, write the scores' gradient
    moved = matrices * queries * keys * BYTES_PER_ELEMENT[precision] * (3 if backward else 2)
    softmax = pass_seconds(device, moved, constants)
    return np.asarray((2 if backward else 1) * (scores + values) + softmax)
