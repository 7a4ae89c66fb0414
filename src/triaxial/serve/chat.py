"""`/v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from pydantic import BaseModel

from triaxial.serve.answer import Choice, Piece
from triaxial.serve.protocol import ChatRequest
from triaxial.serve.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ContentLogprob,
    Delta,
    TopLogprob,
    Usage,
)
from triaxial.serve.request import Request, TokenLogprob
from triaxial.serve.respond import now
from triaxial.serve.served import Served


async def chat_choices(asked: ChatRequest, served: Served) -> list[Choice]:
    """The n sequences that a request asks for.

    Raises:
        ApiError: no template, one that refuses the conversation, or a prompt that is too long.
    """
    prompt = await served.conversation([message.fields for message in asked.messages], asked.chat_template_kwargs or {})
    max_tokens, name = served.max_tokens(prompt, asked.token_limit), f"chatcmpl-{uuid4().hex}"
    choices = []
    for index in range(asked.choices):
        sampling = served.checked(asked.sampling(max_tokens, asked.logprob_count, None, index))
        choices.append(Choice(index, Request(f"{name}-{index}", prompt, sampling), asked.stop_texts))
    return choices


class ChatFormat:
    """Writes one request's answer."""

    def __init__(self, asked: ChatRequest, choices: Sequence[Choice], served: Served) -> None:
        self._id, self._created = choices[0].request.id.rpartition("-")[0], now()
        self._asked, self._count, self._served = asked, len(choices), served

    def opening(self) -> list[BaseModel]:
        """Every choice says first whose message it is."""
        role = Delta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=index, delta=role)], None) for index in range(self._count)]

    def event(self, piece: Piece, usage: Usage | None) -> BaseModel:
        choice = ChatChunkChoice(
            index=piece.index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs([piece]),
            finish_reason=piece.finish_reason,
        )
        return self._chunk([choice], usage)

    def last_event(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> BaseModel:
        choices = [self._choice(index, own) for index, own in enumerate(pieces)]
        return ChatCompletion(id=self._id, created=self._created, model=self._served.name, choices=choices, usage=usage)

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        message = AssistantMessage(content="".join(piece.text for piece in pieces))
        finish = pieces[-1].finish_reason
        assert finish is not None
        return ChatChoice(index=index, message=message, logprobs=self._logprobs(pieces), finish_reason=finish)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._served.name, choices=choices, usage=usage)

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._asked.logprobs:
            return None
        return ChatLogprobs(content=[self._content(one) for piece in pieces for one in piece.logprobs])

    def _content(self, known: TokenLogprob) -> ContentLogprob:
        top = [self._top(token, logprob) for token, logprob in known.top[: self._asked.top_logprobs or 0]]
        own = self._top(known.token, known.logprob)
        return ContentLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text = self._served.token_text(token)
        return TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()))
