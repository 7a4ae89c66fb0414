"""What a client asks of an engine and what it gets back, token by token. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the same values give the same tokens under every layout and in every batch."""

    max_tokens: int = 16
    min_tokens: int = 0
    """Until so many tokens are out, no end-of-sequence or stop token is chosen."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """Two requests with one seed draw the same numbers; None is drawn anew."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. Otherwise the chosen token's log-probability and those of so many likeliest tokens."""
    prompt_logprobs: int | None = None
    """The same for every token of the prompt but the first."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One sequence to be continued."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (natural, before temperature and filters) where one token was chosen or given."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, best first."""


@dataclass(frozen=True)
class Chunk:
    """What has become known of a request since its last chunk."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """In the first chunk only, if asked for."""
    finish_reason: FinishReason | None = None
    """Set in the last chunk. `stop`: an end-of-sequence or stop token (which is the last of `tokens`)."""


class EngineFailed(RuntimeError):
    """The engine cannot go on; the text names the rank and the cause."""


@dataclass(frozen=True)
class EngineStats:
    """What one engine is doing."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    preemptions: int
    """Since the start."""
