"""What a rank runs for one layer and for the output of a step: the operator lists of `plan/cost/blocks.py`, at inference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.blocks import dense_layer, embedding, expert_layer
from triaxial.plan.cost.operators import Attention, Collective, Gemm, Operator, Pass, Shard
from triaxial.plan.cost.practice import Practice
from triaxial.plan.serving.workload import WeightPrecision
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]

_FORWARD = Practice()
SAMPLING_PASSES = 4
"""Times that sampling goes over the fp32 logits: cast, temperature, softmax with its maximum, choice."""


def layer_operators(
    model: ModelSpec, tp: int, tokens: Floats, precision: WeightPrecision, *, experts: bool
) -> list[Operator]:
    """One decoder layer for steps of so many tokens, its attention core apart."""
    block = (expert_layer if experts else dense_layer)(model, _token(precision), _shard(tp, tokens), _FORWARD)
    operators: list[Operator] = [op for op in block.forward if not isinstance(op, Attention)]
    if not experts:
        return operators
    return [_visited(op, model, tokens) if isinstance(op, Gemm) else op for op in operators]


def embedding_operators(model: ModelSpec, tp: int, tokens: Floats, precision: WeightPrecision) -> list[Operator]:
    """The table look-up at the front of the pipeline."""
    return list(embedding(model, _token(precision), _shard(tp, tokens), _FORWARD).forward)


def head_operators(model: ModelSpec, tp: int, rows: Floats, precision: WeightPrecision) -> list[Operator]:
    """Logits of `rows` sequences, gathered over tp, and the choice of a token; the projection is not quantised."""
    own, element = model.vocab / tp, _token(precision).element_bytes
    return [
        Pass(2 * element * rows * model.hidden),
        Gemm(rows, own, float(model.hidden), narrow=False),
        Collective("all_gather", element * rows * model.vocab * (1.0 if tp > 1 else 0.0), "tp"),
        *[Pass(2 * 4 * rows * model.vocab)] * SAMPLING_PASSES,
    ]


def with_fused_all_reduces(operators: list[Operator]) -> list[Operator]:
    """A layer's operators where the residual behind an all-reduce and the norm behind that are parts of its kernel; the
    first norm is that of the layer before."""
    inside, found = 1, list[Operator]()
    for op in operators:
        if isinstance(op, Collective) and op.kind == "all_reduce":
            inside = 2
        elif isinstance(op, Pass) and inside:
            inside, op = inside - 1, replace(op, kernels=0)
        found.append(op)
    return found


def _token(precision: WeightPrecision) -> Training:
    """A micro-batch of n sequences of one token is what the blocks' lists need to tell of n tokens in a step."""
    return Training(global_batch=1, seq_len=1, precision="fp32" if precision == "fp32" else "bf16")


def _shard(tp: int, tokens: Floats) -> Shard:
    return Shard(tp=tp, cp=1, ep=1, mb=tokens, sp=False)


def _visited(op: Gemm, model: ModelSpec, tokens: Floats) -> Gemm:
    """An experts' product over those experts that some token visits.

    With tokens spread at random an expert is left out by all n of them with probability (1 - k / E)^n.
    """
    experts = model.experts
    assert experts is not None
    if np.all(np.asarray(op.batch) == 1):
        return op
    missed = (1 - experts.per_token / experts.count) ** np.maximum(tokens, 1.0)
    reached = experts.count * (1 - missed)
    return replace(op, m=op.m * op.batch / reached, batch=reached)
