"""What a program does beside its layout: counted on a program, or known from its source."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plan.cost.test_operators import shard
from tests.plan.shapes import gpt
from triaxial.plan.cost.blocks import UNALIGNED_SLOWDOWN, dense_layer, head, softmax_passes
from triaxial.plan.cost.operators import Collective, Gemm, Pass
from triaxial.plan.cost.practice import EAGER_OPERATIONS_PER_KERNEL, attention_slowdown
from triaxial.plan.validation.practices import MEGATRON_2022
from triaxial.plan.workload import Training

WORK = Training(global_batch=1, seq_len=8, precision="fp16")
BOOKKEEPING = ("view", "transpose", "aten.t.", "detach", "split", "permute", "expand", "empty")


class EagerLayer(nn.Module):
    """A GPT layer without dropout in plain PyTorch, its attention unfused: [seq, batch, hidden] to the same."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        seq, batch, hidden = x.shape
        parts = self.qkv(self.norms[0](x)).view(seq, batch * self.heads, -1).split(hidden // self.heads, dim=-1)
        q, k, v = (part.transpose(0, 1) for part in parts)  # [batch * heads, seq, dim]
        context = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).transpose(0, 1).reshape(seq, batch, hidden)
        x = x + self.out(context)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Dispatched(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_host_dispatches_three_operations_for_each_kernel() -> None:
    x = torch.randn(8, 1, 16, requires_grad=True)
    layer = EagerLayer(16, 2)
    with Dispatched() as dispatched:
        layer(x).backward(torch.ones(8, 1, 16))
    kernels = sum(n for name, n in dispatched.names.items() if not any(word in name for word in BOOKKEEPING))
    listed = dense_layer(_with_biases(), WORK, shard(mb=2), replace(MEGATRON_2022, dropout=False))
    operators = (*listed.forward, *listed.input_grad, *listed.weight_grad)
    counted = sum(int(op.kernels) if isinstance(op, Pass) else 1 for op in operators if not isinstance(op, Collective))
    assert counted == pytest.approx(kernels, abs=3)
    assert sum(dispatched.names.values()) / counted == pytest.approx(EAGER_OPERATIONS_PER_KERNEL, rel=0.1)


def _with_biases() -> Any:
    return gpt("gpt", 2, 16, 2).model_copy(update={"qkv_bias": True, "out_bias": True, "mlp_bias": True})


def test_megatrons_softmax_is_fused_for_four_matrices_at_a_time() -> None:
    (four, four_back), (six, six_back) = (softmax_passes(n, 1000.0) for n in (4, 6))
    assert (four.bytes, four.kernels, four_back.bytes, four_back.kernels) == (2000, 1, 3000, 1)
    assert (six.bytes, six.kernels, six_back.bytes, six_back.kernels) == (18_000, 5, 20_000, 5)


@pytest.mark.parametrize(("vocab", "tp", "slow"), [(50_257, 1, True), (50_257, 2, False), (50_257, 4, True)])
def test_an_unpadded_vocabulary_slows_the_gradients_of_the_head(vocab: int, tp: int, slow: bool) -> None:
    model = gpt("gpt", 2, 64, 4, vocab=vocab)
    block = head(model, WORK, shard(tp=tp), replace(MEGATRON_2022, pads_vocabulary=False))
    wanted = UNALIGNED_SLOWDOWN if slow else 1.0
    slowdowns = [float(op.slowdown) for op in (*block.input_grad, *block.weight_grad) if isinstance(op, Gemm)]
    assert slowdowns == [wanted, wanted]
    padded = head(model, WORK, shard(tp=tp), MEGATRON_2022)
    assert [float(op.slowdown) for op in padded.input_grad if isinstance(op, Gemm)] == [1.0]


def test_flash_attention_2_does_not_use_hoppers_matrix_units() -> None:
    """1.5 to 2.0 times as slow as FlashAttention-3 (arXiv 2407.08608, abstract)."""
    assert attention_slowdown("flash-2", "ampere") == attention_slowdown("flash-3", "hopper") == 1.0
    assert 1.5 <= attention_slowdown("flash-2", "hopper") <= 2.0
    assert attention_slowdown("flash-1", "ampere") > 1.0
