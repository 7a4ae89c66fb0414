"""A Llama in plain PyTorch, as a user writes it, with the plans that cut it by DTensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from triaxial.model.weights import Piece, initial_values
from workload import SEED, SEQ_LEN, SPEC


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = SPEC.num_heads * SPEC.head_dim
        self.q_proj = nn.Linear(SPEC.hidden, width, bias=False)
        self.k_proj = nn.Linear(SPEC.hidden, width, bias=False)
        self.v_proj = nn.Linear(SPEC.hidden, width, bias=False)
        self.o_proj = nn.Linear(width, SPEC.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, SPEC.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [batch, heads, seq, dim]
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(SPEC.hidden, SPEC.ffn, bias=False)
        self.up_proj = nn.Linear(SPEC.hidden, SPEC.ffn, bias=False)
        self.down_proj = nn.Linear(SPEC.ffn, SPEC.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(SPEC.hidden, SPEC.norm_eps)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(SPEC.hidden, SPEC.norm_eps)
        self.mlp = Mlp()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Blocks [first, stop) of embedding, layers and head: ids [batch, seq] to logits [batch, seq, vocab] if all."""

    def __init__(self, dtype: torch.dtype, first: int = 0, stop: int = SPEC.num_layers + 2) -> None:
        super().__init__()
        layers = range(max(first, 1) - 1, min(stop - 1, SPEC.num_layers))
        self.embed_tokens = nn.Embedding(SPEC.vocab, SPEC.hidden) if first == 0 else None
        self.layers = nn.ModuleDict({str(i): Layer() for i in layers})
        has_head = stop == SPEC.num_layers + 2
        self.norm = nn.RMSNorm(SPEC.hidden, SPEC.norm_eps) if has_head else None
        self.lm_head = nn.Linear(SPEC.hidden, SPEC.vocab, bias=False) if has_head else None
        frequencies = 1 / SPEC.rope_theta ** (torch.arange(0, SPEC.head_dim, 2) / SPEC.head_dim)
        angles = (torch.arange(SPEC.max_positions)[:, None] * frequencies).repeat(1, 2)  # [positions, dim]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._load()
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        cos, sin = self.cos[:SEQ_LEN], self.sin[:SEQ_LEN]
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x

    def _load(self) -> None:
        """The initial values that Triaxial gives to tensors of these names."""
        source = initial_values(SPEC, SEED)
        for name, parameter in self.named_parameters():
            full_name = name if name.startswith("lm_head") else f"model.{name}"
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            init = "ones" if parameter.ndim == 1 else "normal_residual" if writes_residual else "normal"
            with torch.no_grad():
                parameter.copy_(source(Piece(full_name, tuple(parameter.shape), init, 0, 0, parameter.shape[0])))


def tensor_parallel_plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """What `parallelize_module` does with a layer, or with the ends of a model."""
    if isinstance(module, Layer):
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        rows = ("self_attn.o_proj", "mlp.down_proj")
        return {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
    return _present(
        module,
        {
            "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )


def sequence_parallel_plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """The same, with activations between the cut operations sharded over the sequence."""
    cut, whole = Shard(1), Replicate()
    if isinstance(module, Layer):
        return tensor_parallel_plan(module) | {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(input_layouts=(cut, None, None), desired_input_layouts=(whole, None, None)),
            "mlp": PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(whole,)),
            "self_attn.o_proj": RowwiseParallel(output_layouts=cut),
            "mlp.down_proj": RowwiseParallel(output_layouts=cut),
        }
    return _present(
        module,
        {
            "embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=cut),
            "norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=cut, output_layouts=Shard(-1), use_local_output=False),
        },
    )


def _present(module: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The part of a plan whose modules a stage has."""
    return {name: style for name, style in plan.items() if getattr(module, name) is not None}
