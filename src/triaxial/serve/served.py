"""The model that is served, as far as requests are concerned: its name, its tokens and how many fit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triaxial.serve.errors import ApiError
from triaxial.serve.request import Sampling
from triaxial.serve.template import ChatTemplate
from triaxial.serve.text import TextTokenizer


@dataclass(frozen=True)
class Served:
    """Turns texts and conversations into prompts that the engine can take."""

    name: str
    vocab: int
    max_len: int
    """Tokens of prompt and answer together."""
    max_prompt: int
    tokenizer: TextTokenizer | None = None
    template: ChatTemplate | None = None

    async def tokens(self, prompt: str | Sequence[int], special: bool) -> tuple[int, ...]:
        """A prompt's tokens; `special`: text gets the tokens that the model expects around it.

        Raises:
            ApiError: it is empty or too long, a token is out of range, or there is no tokenizer for its text.
        """
        if isinstance(prompt, str):
            tokenizer = self._tokenizer("token ids as the prompt")
            # In a thread: a long text takes a while, and others' tokens are waiting to be sent.
            tokens = tuple(await asyncio.to_thread(tokenizer.encode, prompt, special))
        else:
            tokens = tuple(prompt)
        if not tokens:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        if max(tokens) >= self.vocab:
            raise ApiError(400, f"prompt: token {max(tokens)} is not among the model's {self.vocab}", param="prompt")
        if len(tokens) > self.max_prompt:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens and {self.max_prompt} is the most",
                code="context_length_exceeded",
            )
        return tokens

    async def conversation(self, messages: Sequence[dict[str, Any]], more: dict[str, Any]) -> tuple[int, ...]:
        """The prompt of a conversation.

        Raises:
            ApiError: no template, or one that refuses the conversation; or as for `tokens`.
        """
        if self.template is None:
            raise ApiError(400, f"{self.name} has no chat template: use /v1/completions")
        self._tokenizer("/v1/completions with token ids")
        text = await asyncio.to_thread(self.template.render, messages, more)
        return await self.tokens(text, special=False)

    def _tokenizer(self, instead: str) -> TextTokenizer:
        if self.tokenizer is None:
            raise ApiError(400, f"{self.name} has no tokenizer: use {instead}")
        return self.tokenizer

    def max_tokens(self, prompt: Sequence[int], wanted: int | None) -> int:
        """How many tokens to generate: as many as wanted, or as fit.

        Raises:
            ApiError: they do not fit.
        """
        room = self.max_len - len(prompt)
        if (wanted or 1) > room:
            raise ApiError(
                400,
                f"max_tokens: {len(prompt)} prompt tokens and {wanted or 1} more are over the limit of {self.max_len} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return room if wanted is None else wanted

    def checked(self, sampling: Sampling) -> Sampling:
        """Sampling that names only tokens which exist.

        Raises:
            ApiError: a token is out of range.
        """
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(token >= self.vocab for token in tokens):
                raise ApiError(400, f"{name}: token {max(tokens)} is not among the model's {self.vocab}", param=name)
        return sampling

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens) if self.tokenizer else ""

    def token_text(self, token: int) -> str:
        """A single token's text, or its number in a model without a tokenizer."""
        return self.tokenizer.decode([token]) if self.tokenizer else f"token_id:{token}"
