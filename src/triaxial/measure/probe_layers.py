"""Decoder layers timed as the runtime runs them: what is left beside products and attention are memory-bound passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from triaxial.cluster.timings import PassTiming
from triaxial.measure.probe_products import AttentionShape, LinearShape, attention_timings, gemm_timings
from triaxial.measure.stopwatch import Stopwatch
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.model.weights import initial_values
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Program, Shape, build_program
from triaxial.parallel.stage import MicroBatch
from triaxial.plan.cost.blocks import dense_layer
from triaxial.plan.cost.operators import Block, Gemm, Pass, Shard
from triaxial.plan.cost.practice import OURS
from triaxial.plan.layout import Layout
from triaxial.plan.pipeline.timeline import Span
from triaxial.plan.workload import Precision, Training

_FEW, _MANY = 1, 3
"""Layers of two models, whose difference is that of layers alone."""
_ROUNDS = 2


@dataclass(frozen=True)
class LayerShape:
    """A layer of `small_model` and its micro-batch."""

    micro_batch: int
    seq_len: int
    hidden: int

    def block(self, precision: Precision) -> Block:
        """What the planner lists for it."""
        training = Training(global_batch=self.micro_batch, seq_len=self.seq_len, precision=precision)
        shard = Shard(tp=1, cp=1, ep=1, mb=self.micro_batch, sp=False)
        return dense_layer(small_model(self.hidden, 1), training, shard, OURS)

    def linears(self) -> Iterator[LinearShape]:
        """Its products, to be timed by themselves."""
        for op in self.block("fp32").forward:
            if isinstance(op, Gemm):
                yield LinearShape(*(int(np.asarray(size)) for size in (op.m, op.n, op.k)))

    def attention(self) -> AttentionShape:
        """Its attention, likewise."""
        model = small_model(self.hidden, 1)
        return AttentionShape(self.micro_batch, model.num_heads, self.seq_len, model.head_dim)


LAYERS = (LayerShape(1, 64, 64), LayerShape(4, 128, 128), LayerShape(2, 256, 256), LayerShape(4, 256, 512))


@dataclass(frozen=True)
class LayerRow:
    """One pass of one decoder layer: what it takes beside its products, and what the planner counts for that."""

    kernels: float
    bytes: float
    seconds: float


def layer_rows(watch: Stopwatch, precision: Precision) -> list[tuple[LayerRow, LayerRow]]:
    """Forward and backward pass of every layer in `LAYERS`."""
    rows = []
    for shape in LAYERS:
        block = shape.block(precision)
        forward, backward = (
            LayerRow(
                kernels=float(sum(op.kernels for op in operators if isinstance(op, Pass))),
                bytes=sum(float(np.asarray(op.bytes)) for op in operators if isinstance(op, Pass)),
                seconds=statistics.median(left),
            )
            for operators, left in zip(
                (block.forward, block.input_grad + block.weight_grad), zip(*_left(watch, precision, shape))
            )
        )
        rows.append((forward, backward))
    return rows


def pass_timing(rows: Sequence[LayerRow]) -> PassTiming:
    """The line through rows of one direction."""
    launch_s, bytes_per_s = fit_passes(rows)
    return PassTiming(launch_s=launch_s, bytes_per_s=bytes_per_s)


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


def _left(watch: Stopwatch, precision: Precision, shape: LayerShape) -> Iterator[tuple[float, float]]:
    """Seconds of one layer forward and backward beside its products and attention, which take most of it: they are
    timed again in every round, so that a device that has become slower meanwhile is not taken for passes."""
    dtype = PRECISIONS[precision].compute
    models = [
        whole_model(small_model(shape.hidden, layers), shape.micro_batch, shape.seq_len, precision, watch.device)
        for layers in (_FEW, _MANY)
    ]
    for _ in range(_ROUNDS):
        few, many = (_phases(watch, *model) for model in models)
        products = [point.seconds for point in gemm_timings(watch, dtype, shape.linears())]
        multiplied = sum(products[::3])  # the first of each layer's three is that of the forward pass
        [attention] = attention_timings(watch, dtype, [shape.attention()])
        beside = (multiplied + attention.forward_s, sum(products) - multiplied + attention.backward_s)
        forward, backward = ((long - short) / (_MANY - _FEW) - b for short, long, b in zip(few, many, beside))
        yield forward, backward


def _phases(watch: Stopwatch, program: Program, batch: list[MicroBatch]) -> tuple[float, float]:
    """Seconds of forward and backward pass of one micro-batch."""
    seconds, (forward, backward) = action_seconds(watch, lambda: program.run(batch))
    return seconds * forward, seconds * backward


def action_seconds(watch: Stopwatch, work: Callable[[], Sequence[Span]]) -> tuple[float, list[float]]:
    """Seconds of work, and the share of each of its actions."""
    took: list[list[float]] = []

    def run() -> None:
        began = time.perf_counter()
        spans = work()
        took.append([time.perf_counter() - began, *(span.end_s - span.begin_s for span in spans)])

    seconds = watch.seconds(run)
    whole, *actions = (watch.typical(list(times)) for times in zip(*took[1:]))
    return seconds, [action / whole for action in actions]


def whole_model(
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


def small_model(hidden: int, layers: int) -> ModelSpec:
    """A model with heads of 64, or two."""
    heads = max(2, hidden // 64)
    sizes = {"hidden": hidden, "num_layers": layers, "num_heads": heads, "num_kv_heads": heads // 2}
    sizes |= {"head_dim": hidden // heads, "ffn": hidden * 8 // 3 // 16 * 16}
    return load_model_spec("tiny-byte").model_copy(update=sizes)
