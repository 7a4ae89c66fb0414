"""What a rank runs: matrix products, attention, memory-bound passes and collectives, and how a block lists them.

Sizes may be numbers or numpy arrays over many layouts at once. `plan/cost/blocks.py` writes the lists of a model's blocks,
`plan/cost/pricing.py` prices them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.cost.collectives import CollectiveKind
from triaxial.plan.cost.practice import AttentionKernel, Practice
from triaxial.plan.workload import Training

Size = float | NDArray[Any]
Axis = Literal["tp", "cp", "ep"]


@dataclass(frozen=True)
class Gemm:
    """A matrix multiplication [m, k] x [k, n], `batch` times, in the training precision or, `narrow=False`, in 16 bit."""

    m: Size
    n: Size
    k: Size
    batch: Size = 1
    narrow: bool = True
    slowdown: Size = 1.0
    """Against operands whose rows start at multiples of 16 bytes."""
    result_bytes: float | None = None
    """Bytes moved per element of a result that is added to what is there; None where it is just written."""


@dataclass(frozen=True)
class Attention:
    """A fused causal attention over `sequences` x `heads`, by `kernels` kernels that each see a part of the keys."""

    sequences: Size
    heads: Size
    kv_heads: Size
    queries: Size
    keys: Size
    head_dim: Size
    backward: bool = False
    kernel: AttentionKernel = "flash-3"
    kernels: Size = 1


@dataclass(frozen=True)
class Pass:
    """Memory-bound work: `bytes` read or written by `kernels` kernels."""

    bytes: Size
    kernels: Size = 1


@dataclass(frozen=True)
class Collective:
    """Communication of `bytes` (the full, gathered size of one rank's tensor) over the ranks of one axis."""

    kind: CollectiveKind
    bytes: Size
    axis: Axis


Operator = Gemm | Attention | Pass | Collective


@dataclass(frozen=True)
class Block:
    """What one block of the model runs for one micro-batch. The weight gradient is apart because schedules may run it
    later (arXiv 2401.10241)."""

    forward: tuple[Operator, ...] = ()
    input_grad: tuple[Operator, ...] = ()
    weight_grad: tuple[Operator, ...] = ()
    core: tuple[Operator, ...] = ()
    """The attention core within `forward`: what selective recomputation runs again."""

    def __add__(self, other: Block) -> Block:
        return Block(
            self.forward + other.forward,
            self.input_grad + other.input_grad,
            self.weight_grad + other.weight_grad,
            self.core + other.core,
        )

    def with_slower_gradients(self, slowdown: Size) -> Block:
        """The same block with its gradients' matrix products slowed down."""
        input_grad, weight_grad = (
            tuple(replace(op, slowdown=slowdown) if isinstance(op, Gemm) else op for op in phase)
            for phase in (self.input_grad, self.weight_grad)
        )
        return replace(self, input_grad=input_grad, weight_grad=weight_grad)


@dataclass(frozen=True)
class Shard:
    """How one rank's part of a micro-batch is cut. Fields are numbers or arrays of equal length."""

    tp: Size
    cp: Size
    ep: Size
    mb: Size
    sp: Size
    folds: Size = 1
    """Tensor-parallel ranks that hold different experts; the others share each expert."""

    def tokens(self, seq_len: int) -> Size:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.mb * (seq_len / self.cp)

    def tokens_outside_tp(self, seq_len: int) -> Size:
        """Tokens that norms and residual additions see: cut over tp only with sequence parallelism."""
        return self.tokens(seq_len) / np.where(self.sp, self.tp, 1)


def linear(
    tokens: Size, n: Size, k: Size, training: Training, practice: Practice, batch: Size = 1, bias: bool = False
) -> Block:
    """A weight [k, n] applied to `tokens` rows, `batch` times (experts), with its gradient accumulation. A bias is
    added in passing, but its gradient reads the output's once more."""
    bias_grad = (Pass(batch * tokens * n * training.element_bytes),) if bias else ()
    added_to = 2.0 * practice.gradient_bytes if practice.fused_accumulation else None
    return Block(
        (Gemm(tokens, n, k, batch),),
        (Gemm(tokens, k, n, batch),),
        (
            Gemm(k, n, tokens, batch, result_bytes=added_to),
            *bias_grad,
            *accumulation(batch * k * n, training, practice),
        ),
    )


def accumulation(weights: Size, training: Training, practice: Practice) -> tuple[Operator, ...]:
    """Adding a micro-batch's weight gradient to the buffer, unless the product does: reads both, writes one."""
    alike = practice.gradient_bytes == training.element_bytes
    if practice.fused_accumulation or (alike and practice.fused_alike_accumulation):
        return ()
    return (Pass(weights * (2 * practice.gradient_bytes + training.element_bytes)),)


def passes(forward_bytes: Size, backward_bytes: Size, practice: Practice, unfused_kernels: int) -> Block:
    """An element-wise chain: one kernel when fused, else `unfused_kernels` that each read and write again."""
    if practice.fused_passes:
        return Block((Pass(forward_bytes),), (Pass(backward_bytes),))
    # an unfused chain moves its tensor once more per two extra kernels: every other one is in-place or a broadcast
    spread = (1 + unfused_kernels) / 2
    return Block((Pass(forward_bytes * spread, unfused_kernels),), (Pass(backward_bytes * spread, unfused_kernels),))
