"""Models and clusters that several planning tests share."""

from __future__ import annotations

from triaxial.model.spec import Experts, ModelSpec


def gpt(name: str, layers: int, hidden: int, heads: int, vocab: int = 51_200, seq_len: int = 2048) -> ModelSpec:
    """A GPT of Megatron's papers: LayerNorm, learned positions, an MLP four times as wide."""
    return ModelSpec(
        name=name,
        family="gpt3",
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocab=vocab,
        max_positions=seq_len,
        gated_mlp=False,
        learned_positions=True,
        layer_norm=True,
    )


def llama(layers: int = 8, hidden: int = 1024, heads: int = 16, kv_heads: int = 8, ffn: int = 4096) -> ModelSpec:
    """A small Llama."""
    return ModelSpec(
        name="small",
        family="llama",
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=32_000,
        max_positions=8192,
    )


def mixture(experts: int = 8, per_token: int = 2) -> ModelSpec:
    """A small mixture of experts."""
    routed = Experts(count=experts, per_token=per_token, ffn=512, shared=1, first_dense_layers=1)
    return llama().model_copy(update={"family": "qwen3_moe", "experts": routed})
