"""What clients send: OpenAI's completions and chat completions, with the fields that vLLM's clients add.

Fields that are not named here are ignored, as OpenAI-compatible servers do; those that would change the answer and
that we cannot honour are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from triaxial.serve.request import Sampling

MAX_CHOICES = 128
MAX_LOGPROBS = 20
_INT64 = 1 << 63

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=2048, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Penalty = Annotated[FiniteFloat, Field(ge=-2, le=2)]


class Model(BaseModel):
    """No value is converted: "5" is no number, as the published schema says."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Model):
    include_usage: bool | None = None
    """A last event with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """vLLM's: the usage so far in every event."""


class SamplingFields(Model):
    """What both kinds of request say about choosing tokens."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, le=_INT64 - 1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        dict[Annotated[str, Field(min_length=1, max_length=10)], Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None
    ) = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=_INT64 - 1)] | None = None
    """-1 and 0 keep all."""
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: NonNegativeInt | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None, choice: int) -> Sampling:
        """How the tokens of one choice are drawn; each choice has a seed of its own."""
        given: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens or 0, max_tokens),
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed + choice,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            **given,
        )

    @model_validator(mode="after")
    def _bias_names_tokens(self) -> Self:
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit()):
                raise ValueError(f"logit_bias: {token!r} is no token id")
        return self


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Tokens | TokenLists | str | Texts
    """Text, token ids, or a list of either."""
    max_tokens: NonNegativeInt | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, of one kind."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of other than n is not supported")
        if self.suffix:
            raise ValueError("suffix is not supported")
        return self


class TextPart(Model):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation; further fields are the template's business."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """For the template, the text as one string."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content
        return {**(self.model_extra or {}), "role": self.role, "content": text or ""}


class ResponseFormat(Model):
    type: Literal["text"]


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """Tools are not supported."""
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: more variables for the template."""

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
