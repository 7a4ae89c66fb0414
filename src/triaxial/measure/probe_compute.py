"""What one device does in a second: products, attention and the passes around them, as the runtime runs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from triaxial.cluster.timings import AttentionTiming, DeviceTimings, GemmTiming
from triaxial.measure.stopwatch import Stopwatch
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.model.weights import initial_values
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Program, Shape, build_program
from triaxial.parallel.stage import MicroBatch
from triaxial.plan.cost.blocks import dense_layer
from triaxial.plan.cost.operators import Attention, Gemm, Operator, Pass, Shard
from triaxial.plan.cost.practice import OURS
from triaxial.plan.cost.timed import timed_attention_seconds, timed_gemm_seconds
from triaxial.plan.layout import Layout
from triaxial.plan.workload import Precision, Training
from triaxial.train.corpus import build_corpus
from triaxial.train.optimizer import Hyperparameters, Optimizer
from triaxial.train.step import peak_memory_bytes, training_step
from triaxial.train.tokenizer import ByteTokenizer

TOKENS = (1, 8, 64, 256, 1024)
WIDTHS = (
    (64, 64),
    (192, 64),
    (256, 256),
    (768, 256),
    (256, 1024),
    (1024, 256),
    (1024, 1024),
    (3072, 1024),
    (1024, 4096),
)
"""(out, in) of linear layers as models have them, small and skinny ones too."""
ATTENTIONS = (
    (1, 64, 32),
    (4, 64, 32),
    (2, 128, 64),
    (8, 128, 64),
    (1, 512, 64),
    (4, 512, 64),
    (1, 1024, 64),
    (1, 512, 128),
)
"""(sequences, length, head_dim), with `_HEADS` heads over half as many kv heads."""
_HEADS = 4
_STREAM_BYTES = 64 << 20
_LAYERS = ((1, 64, 64), (4, 128, 128), (2, 256, 256), (4, 256, 512))
"""(micro-batch, sequence, hidden) of the layers whose passes are timed."""


def gemm_timings(watch: Stopwatch, dtype: torch.dtype) -> Iterator[GemmTiming]:
    """The three products of a linear layer: forward x W^T, input gradient dy W, weight gradient dy^T x."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=watch.device)

    for out, into in WIDTHS:
        weight = random(out, into)
        for tokens in TOKENS:
            x, dy = random(tokens, into), random(tokens, out)
            products = [
                (partial(F.linear, x, weight), (tokens, out, into)),
                (partial(torch.mm, dy, weight), (tokens, into, out)),
                (partial(torch.mm, dy.t(), x), (into, out, tokens)),
            ]
            for work, (m, n, k) in products:
                yield GemmTiming(m=m, n=n, k=k, seconds=watch.seconds(work))


def attention_timings(watch: Stopwatch, dtype: torch.dtype) -> Iterator[AttentionTiming]:
    """The attention core forward and backward, heads grouped two by two."""
    for sequences, length, head_dim in ATTENTIONS:

        def random(heads: int, shape: tuple[int, int, int] = (sequences, length, head_dim)) -> Tensor:
            x = torch.randn(shape[0], heads, *shape[1:], dtype=dtype, device=watch.device)
            return x.requires_grad_()

        qkv = random(_HEADS), random(_HEADS // 2), random(_HEADS // 2)
        attend = partial(F.scaled_dot_product_attention, *qkv, is_causal=True, enable_gqa=True)
        y = attend()
        differentiate = partial(torch.autograd.grad, y, qkv, torch.randn_like(y), retain_graph=True)
        yield AttentionTiming(
            sequences=sequences,
            heads=_HEADS,
            kv_heads=_HEADS // 2,
            length=length,
            head_dim=head_dim,
            forward_s=watch.seconds(attend),
            backward_s=watch.seconds(differentiate),
        )


def device_timings(
    watch: Stopwatch, precisions: Sequence[Precision], per_machine: int, tell: Callable[[str], None]
) -> tuple[DeviceTimings, float, float]:
    """Every point of a device, its stream rate in bytes per second, and the seconds of its smallest operation."""
    step_s = step_seconds(watch)
    reserve = peak_memory_bytes(watch.device)  # after a first small step, which loads what every step needs
    gemm, attention, passes = {}, {}, {}
    for precision in precisions:
        dtype = PRECISIONS[precision].compute
        tell(f"matrix products in {precision}")
        gemm[precision] = tuple(gemm_timings(watch, dtype))
        tell(f"attention in {precision}")
        attention[precision] = tuple(attention_timings(watch, dtype))
        tell(f"layers in {precision}")
        passes[precision] = fit_passes(layer_rows(watch, precision, gemm[precision], attention[precision]))
    timings = DeviceTimings(
        gemm=gemm,
        attention=attention,
        pass_bytes_per_s={precision: rate for precision, (_, rate) in passes.items()},
        pass_launch_s={precision: launch for precision, (launch, _) in passes.items()},
        step_s=step_s,
        token_s=token_seconds(watch),
        reserve_bytes=reserve,
        ranks_per_processor=max(1.0, per_machine / (os.cpu_count() or 1)) if watch.device.type == "cpu" else 1.0,
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


@dataclass(frozen=True)
class LayerRow:
    """One pass of one decoder layer: what it takes beside its products, and what the planner counts for that."""

    kernels: float
    bytes: float
    seconds: float


def layer_rows(
    watch: Stopwatch, precision: Precision, gemm: Sequence[GemmTiming], attention: Sequence[AttentionTiming]
) -> list[LayerRow]:
    """Layers timed as the runtime runs them: what products and attention leave over are memory-bound passes."""
    rows = []
    for micro_batch, seq_len, hidden in _LAYERS:
        few, many = (_phases(watch, precision, _model(hidden, layers), micro_batch, seq_len) for layers in (1, 3))
        training = Training(global_batch=micro_batch, seq_len=seq_len, precision=precision)
        block = dense_layer(_model(hidden, 1), training, Shard(tp=1, cp=1, ep=1, mb=micro_batch, sp=False), OURS)
        for operators, short, long in zip((block.forward, block.input_grad + block.weight_grad), few, many):
            passes = [op for op in operators if isinstance(op, Pass)]
            row = LayerRow(
                kernels=float(sum(op.kernels for op in passes)),
                bytes=sum(float(np.asarray(op.bytes)) for op in passes),
                seconds=(long - short) / 2 - _products(operators, gemm, attention),
            )
            rows.append(row)
    return rows


def fit_passes(rows: Sequence[LayerRow]) -> tuple[float, float]:
    """(seconds per pass, bytes per second) with the least relative error over the rows."""
    measured = [row for row in rows if row.seconds > 0]
    scaled = np.array([(row.kernels / row.seconds, row.bytes / row.seconds) for row in measured])
    launch, per_byte = _nearest_to_one(scaled)
    return float(launch), float(1 / max(per_byte, 1e-15))


def _nearest_to_one(scaled: NDArray[np.float64]) -> tuple[float, float]:
    """The two weights, neither negative, whose sum over each row is nearest to 1."""
    both = np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = scaled.sum(axis=0) / np.square(scaled).sum(axis=0)
    left = np.square(scaled * alone - 1).sum(axis=0)
    return (float(alone[0]), 0.0) if left[0] < left[1] else (0.0, float(alone[1]))


def _products(operators: Sequence[Operator], gemm: Sequence[GemmTiming], attention: Sequence[AttentionTiming]) -> float:
    total = 0.0
    for op in operators:
        if isinstance(op, Gemm):
            total += float(timed_gemm_seconds(gemm, op.m, op.n, op.k, op.batch))
        elif isinstance(op, Attention):
            sizes = {"batch": op.sequences, "heads": op.heads, "queries": op.queries, "keys": op.keys}
            total += float(timed_attention_seconds(attention, **sizes, head_dim=op.head_dim, backward=op.backward))
    return total


def _phases(
    watch: Stopwatch, precision: Precision, model: ModelSpec, micro_batch: int, seq_len: int
) -> tuple[float, float]:
    """Seconds of forward and backward pass of one micro-batch."""
    program, batch = _single(model, micro_batch, seq_len, precision, watch.device)
    took: list[list[float]] = []
    watch.seconds(lambda: took.append([span.end_s - span.begin_s for span in program.run(batch)]))
    forward, backward = (watch.typical(list(phase)) for phase in zip(*took[1:]))
    return forward, backward


def step_seconds(watch: Stopwatch) -> float:
    """Seconds of a training step beside the actions of its schedule, for a model too small to matter."""
    program, batch = _single(_model(64, 1), 1, 16, "fp32", watch.device)
    optimizer = Optimizer(program.units, Hyperparameters())
    busy: list[float] = []

    def step() -> None:
        spans = training_step(program, optimizer, batch, lr=0.0).spans
        busy.append(sum(span.end_s - span.begin_s for span in spans))

    whole = watch.seconds(step)
    return max(0.0, whole - watch.typical(busy))


def _single(
    model: ModelSpec, micro_batch: int, seq_len: int, precision: Precision, device: torch.device
) -> tuple[Program, list[MicroBatch]]:
    """The whole model on this rank alone, and random tokens for it."""
    program = build_program(
        model,
        Layout(mb=micro_batch),
        shape=Shape(micro_batch, seq_len),
        num_micro_batches=1,
        precision=PRECISIONS[precision],
        device=device,
    )
    program.load(initial_values(model, seed=0))
    ids = torch.randint(model.vocab, (micro_batch * seq_len,), device=device)
    return program, [MicroBatch(ids, ids, torch.ones((), device=device))]


def _model(hidden: int, layers: int) -> ModelSpec:
    heads = max(2, hidden // 64)
    sizes = {"hidden": hidden, "num_layers": layers, "num_heads": heads, "num_kv_heads": heads // 2}
    sizes |= {"head_dim": hidden // heads, "ffn": hidden * 8 // 3 // 16 * 16}
    return load_model_spec("tiny-byte").model_copy(update=sizes)
