"""`/v1/completions`: text or token ids in, text out, with the legacy log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from pydantic import BaseModel

from triaxial.serve.answer import Choice, Piece
from triaxial.serve.protocol import CompletionRequest
from triaxial.serve.replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from triaxial.serve.request import Request, TokenLogprob
from triaxial.serve.respond import now
from triaxial.serve.served import Served

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completion_choices(asked: CompletionRequest, served: Served) -> list[Choice]:
    """The sequences that a request asks for: n of each prompt.

    Raises:
        ApiError: a prompt is too long, empty or text without a tokenizer.
    """
    prompts = [await served.tokens(prompt, special=True) for prompt in asked.prompts]
    wanted = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    choices, name = list[Choice](), f"cmpl-{uuid4().hex}"
    for prompt in prompts:
        max_tokens = served.max_tokens(prompt, max(1, wanted))
        for n in range(asked.choices):
            index = len(choices)
            sampling = asked.sampling(max_tokens, asked.logprobs, asked.logprobs if asked.echo else None, n)
            request = Request(f"{name}-{index}", prompt, served.checked(sampling))
            choices.append(Choice(index, request, asked.stop_texts, silent=wanted == 0))
    return choices


class CompletionFormat:
    """Writes one request's answer."""

    def __init__(self, asked: CompletionRequest, choices: Sequence[Choice], served: Served) -> None:
        self._id, self._created = choices[0].request.id.rpartition("-")[0], now()
        self._asked, self._choices, self._served = asked, choices, served
        self._length = [0] * len(choices)
        """Characters of each choice's tokens so far, for `text_offset`."""
        self._begun = [False] * len(choices)

    def opening(self) -> list[BaseModel]:
        return []

    def event(self, piece: Piece, usage: Usage | None) -> BaseModel:
        return self._completion([self._choice(piece.index, [piece])], usage)

    def last_event(self, usage: Usage) -> BaseModel:
        return self._completion([], usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> BaseModel:
        return self._completion([self._choice(index, own) for index, own in enumerate(pieces)], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._served.name, choices=choices, usage=usage)

    def _choice(self, index: int, pieces: Sequence[Piece]) -> CompletionChoice:
        text, known = "".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.logprobs]
        prompt = self._choices[index].request.prompt
        echoed = bool(self._asked.echo) and not self._begun[index]
        self._begun[index] = True
        if echoed:
            text = self._served.text(prompt) + text
        logprobs = None
        if self._asked.logprobs is not None:
            before = [*pieces[0].prompt_logprobs] if echoed else []
            logprobs = self._logprobs(index, prompt[:1] if echoed else (), [*before, *known])
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=pieces[-1].finish_reason)

    def _logprobs(self, index: int, first: Sequence[int], known: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """`first`: the prompt's first token, of which nothing can be said, if it is echoed."""
        tokens = [self._served.token_text(token) for token in (*first, *(one.token for one in known))]
        offsets = []
        for token in tokens:
            offsets.append(self._length[index])
            self._length[index] += len(token)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[*(None for _ in first), *(one.logprob for one in known)],
            top_logprobs=[*(None for _ in first), *(self._top(one) for one in known)],
            text_offset=offsets,
        )

    def _top(self, known: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the one itself; where several have the same text, the likeliest counts."""
        top: dict[str, float] = {}
        for token, logprob in (*known.top, (known.token, known.logprob)):
            top.setdefault(self._served.token_text(token), logprob)
        return top
