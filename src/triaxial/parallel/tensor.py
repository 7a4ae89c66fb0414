"""The tensor-parallel axis: every operation of the decoder that is cut over ranks.

Activations are plain local tensors [tokens, width], tokens ordered sequence-major (token = position * batch +
sample), so that sequence parallelism cuts dimension 0. Each operation is one autograd function that holds the
conjugate pair of collectives of Megatron-LM (arXiv 1909.08053, section 3; with sequence parallelism arXiv
2205.05198, section 4.2.2) and puts its weight gradient straight into `weight.main_grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from triaxial.model import IGNORE
from triaxial.parallel.mesh import Axis


class WeightGradients:
    """Runs weight-gradient work at once, or postpones it to a W action (zero-bubble schedules)."""

    def __init__(self) -> None:
        self._postponed: list[Callable[[], None]] | None = None

    def put(self, work: Callable[[], None]) -> None:
        if self._postponed is None:
            work()
        else:
            self._postponed.append(work)

    def postpone(self) -> None:
        self._postponed = []

    def take(self) -> list[Callable[[], None]]:
        """The work postponed since `postpone()`; what comes next runs at once again."""
        work, self._postponed = self._postponed or [], None
        return work


class TensorParallel:
    """The decoder's operations over one tensor-parallel axis (which may have a single rank)."""

    def __init__(self, axis: Axis, *, sequence_parallel: bool = False, keep_cheap: bool = True) -> None:
        """`keep_cheap`: keep norm outputs and gated activations for backward instead of computing them again."""
        self.axis = axis
        self.sequence_parallel = sequence_parallel and axis.size > 1
        self.keep_cheap = keep_cheap
        self.gradients = WeightGradients()

    def norm_column(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
        """RMS norm, then a linear layer whose outputs are cut: [tokens(/tp), hidden] -> [tokens, out/tp]."""
        y: Tensor = _NormColumn.apply(x, norm, eps, weight, bias, self)
        return y

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Tensor:
        """Linear layer whose inputs are cut, summed over ranks: [tokens, in/tp] -> [tokens(/tp), hidden].

        `gated`: `x` holds gate and up side by side [tokens, 2 * in/tp], and silu(gate) * up is what is multiplied.
        """
        y: Tensor = _Row.apply(x, weight, gated, self)
        return y if bias is None else _AddBias.apply(y, bias)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """A layer's input x and what one of its halves made of it, y, which nobody needs afterwards."""
        return x + y

    def head_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension of q or k, one weight for all heads."""
        y: Tensor = _Norm.apply(x, weight, eps)
        return y

    def embed(self, ids: Tensor, weight: Tensor, first_row: int) -> Tensor:
        """Vocab-parallel lookup: ids [tokens] -> [tokens(/tp), hidden]; this rank has rows from `first_row`."""
        x: Tensor = _Embed.apply(ids, weight, first_row, self)
        return x

    def cross_entropy(self, logits: Tensor, labels: Tensor, first_row: int, vocab: int) -> Tensor:
        """Sum of the cross-entropies of labels [tokens] under logits cut over the vocabulary [tokens, vocab/tp].

        Full logits are never gathered: three numbers a token are reduced. `logits` is overwritten.
        """
        loss: Tensor = _CrossEntropy.apply(logits, labels, first_row, vocab, self.axis)
        return loss

    def enter(self, x: Tensor) -> Tensor:
        """What a cut linear layer multiplies: all tokens."""
        return self.axis.all_gather(x) if self.sequence_parallel else x

    def leave(self, x: Tensor) -> Tensor:
        """Sum partial results over ranks; under sequence parallelism keep this rank's tokens."""
        return self.axis.reduce_scatter(x) if self.sequence_parallel else self.axis.all_reduce(x)


def _accumulate(weight: Tensor, dy: Tensor, x: Tensor) -> None:
    """main_grad += dy^T x, with dy [tokens, out] and x [tokens, in]."""
    total: Tensor = weight.main_grad  # type: ignore[attr-defined]
    if total.dtype == dy.dtype:
        total.addmm_(dy.t(), x)
    else:
        total.add_(dy.t() @ x)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]


def _wide(x: Tensor) -> Tensor:
    """Norms and softmax of half-precision tensors are computed in fp32."""
    return x.float() if x.element_size() < 4 else x


def _rms(x: Tensor, eps: float) -> Tensor:
    """Reciprocal root mean square of the last dimension: [..., n] -> [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normalise(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return (_wide(x) * rstd).to(x.dtype) * weight


def _norm_backward(x: Tensor, rstd: Tensor, weight: Tensor, dn: Tensor) -> Tensor:
    """Input gradient of the RMS norm; the weight's goes to its main_grad."""
    unit, dn = _wide(x) * rstd, _wide(dn)
    dunit = dn * weight
    product = dn * unit
    # A product with a vector sums faster than a reduction over rows or columns does.
    projection = product @ weight.to(product.dtype) / x.shape[-1]
    rows = product.reshape(-1, x.shape[-1])
    _add(weight, rows.new_ones(rows.shape[0]) @ rows)
    return dunit.addcmul_(unit, projection.unsqueeze(-1), value=-1).mul_(rstd).to(x.dtype)


class _NormColumn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, tp: TensorParallel):  # type: ignore[no-untyped-def]
        rstd = _rms(x, eps)
        n = _normalise(x, rstd, norm)
        ctx.save_for_backward(x, rstd, n if tp.keep_cheap else None)
        # Parameters are kept as plain attributes: ZeRO-3 frees and refills their storage between the passes.
        ctx.norm, ctx.weight, ctx.bias, ctx.tp = norm, weight, bias, tp
        return F.linear(tp.enter(n), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        x, rstd, n = ctx.saved_tensors
        tp, weight, bias = ctx.tp, ctx.weight, ctx.bias
        if n is None:
            n = _normalise(x, rstd, ctx.norm)
        gather = tp.axis.all_gather_async(n) if tp.sequence_parallel else None
        dn = dy @ weight
        full = gather.wait() if gather else n
        reduce = tp.axis.reduce_scatter_async(dn) if tp.sequence_parallel else tp.axis.all_reduce_async(dn)

        def weight_gradient() -> None:  # runs while the input gradient is being reduced
            _accumulate(weight, dy, full)
            if bias is not None:
                _add(bias, dy.sum(0))

        tp.gradients.put(weight_gradient)
        return _norm_backward(x, rstd, ctx.norm, reduce.wait()), None, None, None, None, None


class _Row(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gated: bool, tp: TensorParallel):  # type: ignore[no-untyped-def]
        h = _gate(x) if gated else x
        ctx.save_for_backward(x, h if gated and tp.keep_cheap else None)
        ctx.weight, ctx.gated, ctx.tp = weight, gated, tp
        return tp.leave(F.linear(h, weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        x, h = ctx.saved_tensors
        tp, weight = ctx.tp, ctx.weight
        dy = tp.enter(dy)
        dh = dy @ weight

        def weight_gradient() -> None:
            _accumulate(weight, dy, (_gate(x) if h is None else h) if ctx.gated else x)

        tp.gradients.put(weight_gradient)
        return (_gate_backward(x, dh) if ctx.gated else dh), None, None, None


def _gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _gate_backward(x: Tensor, dh: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.mul(F.silu(gate), dh, out=dup)
    torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dgate)
    return dx


class _AddBias(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor):  # type: ignore[no-untyped-def]
        ctx.bias = bias
        return x + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        _add(ctx.bias, dy.sum(0))
        return dy, None


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float):  # type: ignore[no-untyped-def]
        rstd = _rms(x, eps)
        ctx.save_for_backward(x, rstd)
        ctx.weight = weight
        return _normalise(x, rstd, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        x, rstd = ctx.saved_tensors
        return _norm_backward(x, rstd, ctx.weight, dy), None, None


class _Embed(Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, first_row: int, tp: TensorParallel):  # type: ignore[no-untyped-def]
        local = ids - first_row
        absent = (local < 0) | (local >= weight.shape[0])
        local = local.masked_fill_(absent, 0)
        ctx.local, ctx.absent, ctx.weight, ctx.tp = local, absent, weight, tp
        return tp.leave(F.embedding(local, weight).masked_fill_(absent[:, None], 0))

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        dy = ctx.tp.enter(dy).masked_fill(ctx.absent[:, None], 0)
        total = ctx.weight.main_grad
        total.index_add_(0, ctx.local, dy.to(total.dtype))
        return None, None, None, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first_row: int, vocab: int, axis: Axis):  # type: ignore[no-untyped-def]
        scores = _wide(logits)
        scores[:, max(0, vocab - first_row) :] = -torch.inf  # padding rows
        largest = axis.all_reduce_max(scores.amax(-1, keepdim=True))
        local = labels - first_row
        absent = (local < 0) | (local >= logits.shape[1])
        local = local.masked_fill_(absent, 0)
        scores.sub_(largest)
        target = scores.gather(1, local[:, None]).squeeze(1).masked_fill_(absent, 0)
        total = scores.exp_().sum(-1)
        total, target = axis.all_reduce(torch.stack([total, target]))
        valid = labels != IGNORE
        ctx.save_for_backward(scores, total, local, absent | ~valid, valid)
        ctx.dtype = logits.dtype
        return torch.where(valid, total.log() - target, 0).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):  # type: ignore[no-untyped-def]
        probabilities, total, local, no_target, valid = ctx.saved_tensors
        probabilities.mul_((valid * dloss / total)[:, None])
        one = torch.where(no_target, 0, -dloss)
        probabilities.scatter_add_(1, local[:, None], one[:, None].to(probabilities.dtype))
        return probabilities.to(ctx.dtype), None, None, None, None
