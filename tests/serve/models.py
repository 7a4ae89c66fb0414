"""Small random-weight models, saved by transformers, and what it decodes with them: the reference of the engine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 101
LONGEST = 1100

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "vocab_size": VOCAB, "max_position_embeddings": LONGEST, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES | {"head_dim": 32}, rope_parameters=LLAMA3_ROPE))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES | {"head_dim": 64}, sliding_window=37))
        case "qwen2":
            windows = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2}
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **windows))
        case _:
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 10, "tie_word_embeddings": True}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of one and biases of zero would hide a mistake
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


class Reference:
    """One model, its folder, and transformers' answers."""

    def __init__(self, family: str, folder: Path) -> None:
        torch.set_num_threads(1)  # the ranks need the cores
        self.folder, self._model = folder, build(family)
        self._model.save_pretrained(folder)
        self.greedy = lru_cache(maxsize=None)(self._greedy)

    @torch.no_grad()
    def _greedy(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        """The likeliest continuation, one token after the other, and each token's log-probability."""
        tokens, logprobs, past = list(prompt), [], None
        fed = torch.tensor([tokens])
        for _ in range(count):
            out = self._model(fed, past_key_values=past, use_cache=True)
            past, scores = out.past_key_values, out.logits[0, -1].log_softmax(-1)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            fed = torch.tensor([tokens[-1:]])
        return tokens[len(prompt) :], logprobs

    @torch.no_grad()
    def scores(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities [tokens, vocab] of what follows each token, all at once."""
        return self._model(torch.tensor([tokens])).logits[0].log_softmax(-1)
