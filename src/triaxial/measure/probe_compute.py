"""What one device does in a second: products, attention and the passes around them, as the runtime runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from triaxial.cluster.timings import DeviceTimings
from triaxial.measure.probe_layers import action_seconds, layer_rows, pass_timing, small_model, whole_model
from triaxial.measure.probe_products import ATTENTIONS, LINEARS, attention_timings, gemm_timings
from triaxial.measure.stopwatch import Stopwatch
from triaxial.parallel.data import PRECISIONS
from triaxial.plan.workload import Precision
from triaxial.train.corpus import build_corpus
from triaxial.train.optimizer import Hyperparameters, Optimizer
from triaxial.train.step import peak_memory_bytes, training_step
from triaxial.train.tokenizer import ByteTokenizer

_STREAM_BYTES = 64 << 20


def device_timings(
    watch: Stopwatch, precisions: Sequence[Precision], turns: float, tell: Callable[[str], None]
) -> tuple[DeviceTimings, float, float]:
    """Every point of a device, its stream rate in bytes per second, and the seconds of its smallest operation.

    Args:
        turns: ranks to a processor.
    """
    step_s = step_seconds(watch)
    reserve = peak_memory_bytes(watch.device)  # after a first small step, which loads what every step needs
    gemm, attention, forward, backward = {}, {}, {}, {}
    for precision in precisions:
        dtype = PRECISIONS[precision].compute
        tell(f"matrix products in {precision}")
        gemm[precision] = tuple(gemm_timings(watch, dtype, LINEARS))
        tell(f"attention in {precision}")
        attention[precision] = tuple(attention_timings(watch, dtype, ATTENTIONS))
        tell(f"layers in {precision}")
        rows = layer_rows(watch, precision)
        forward[precision], backward[precision] = (pass_timing(phase) for phase in zip(*rows))
    timings = DeviceTimings(
        gemm=gemm,
        attention=attention,
        forward_passes=forward,
        backward_passes=backward,
        step_s=step_s,
        token_s=token_seconds(watch),
        reserve_bytes=reserve,
        ranks_per_processor=turns,
    )
    return timings, stream_bytes_per_s(watch), launch_seconds(watch)


def reference_seconds(watch: Stopwatch) -> float:
    """This rank's own seconds of one large product."""
    x = torch.randn(1024, 1024, device=watch.device)
    return watch.own_seconds(lambda: x @ x)


def token_seconds(watch: Stopwatch) -> float:
    """Seconds to read one token of a batch from the memory map of a corpus."""
    samples, seq_len = 16, 256
    with tempfile.TemporaryDirectory(prefix="triaxial-") as folder:
        text = Path(folder) / "text.txt"
        text.write_text("0123456789abcdef" * (seq_len * samples), encoding="utf-8")
        corpus = build_corpus(text, ByteTokenizer(), Path(folder))
        indices = np.random.default_rng(0).permutation(len(corpus.split(seq_len)[0]))[:samples]
        return watch.seconds(lambda: corpus.batch(indices, seq_len)) / (samples * seq_len)


def stream_bytes_per_s(watch: Stopwatch) -> float:
    """Bytes per second, read and written together, of a long addition in place."""
    x, y = (torch.zeros(_STREAM_BYTES // 4, device=watch.device) for _ in range(2))
    return 3 * _STREAM_BYTES / watch.seconds(lambda: x.add_(y))


def launch_seconds(watch: Stopwatch) -> float:
    """Seconds of the smallest operation."""
    x = torch.zeros(1, device=watch.device)
    return watch.seconds(lambda: x.add_(x))


def step_seconds(watch: Stopwatch) -> float:
    """Seconds of a training step beside the actions of its schedule, for a model too small to matter."""
    program, batch = whole_model(small_model(64, 1), 1, 16, "fp32", watch.device)
    optimizer = Optimizer(program.units, Hyperparameters())
    seconds, shares = action_seconds(watch, lambda: training_step(program, optimizer, batch, lr=0.0).spans)
    return seconds * (1 - sum(shares))
