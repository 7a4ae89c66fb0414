"""An answer as one JSON document or as server-sent events."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from triaxial.serve.answer import Answerer, Choice, Piece
from triaxial.serve.errors import ApiError, bug
from triaxial.serve.protocol import SamplingFields
from triaxial.serve.replies import Usage

log = logging.getLogger("triaxial.serve")


class Format(Protocol):
    """How one kind of answer is written."""

    def opening(self) -> list[BaseModel]:
        """Events that come before any piece."""

    def event(self, piece: Piece, usage: Usage | None) -> BaseModel: ...

    def last_event(self, usage: Usage) -> BaseModel: ...

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> BaseModel:
        """`pieces`: those of each choice."""


class Counter:
    """The tokens of an answer."""

    def __init__(self, choices: Sequence[Choice], asked: SamplingFields) -> None:
        self._prompt = sum(len(choice.request.prompt) for choice in choices[:: asked.choices])  # n share a prompt
        self._completion = 0

    def add(self, piece: Piece) -> None:
        self._completion += piece.tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self._prompt + self._completion,
        )


async def respond(answerer: Answerer, choices: Sequence[Choice], asked: SamplingFields, form: Format) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be answered; nothing has been sent then.
    """
    if not asked.stream:
        return await _whole(answerer, choices, asked, form)
    events = _events(answerer, choices, asked, form)
    try:
        first = await anext(events)  # until here a failure has a status of its own
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)


async def _whole(answerer: Answerer, choices: Sequence[Choice], asked: SamplingFields, form: Format) -> Response:
    counter, pieces = Counter(choices, asked), list[list[Piece]]([] for _ in choices)
    async with aclosing(answerer.answer(choices, whole=True)) as answer:
        async for piece in answer:
            counter.add(piece)
            pieces[piece.index].append(piece)
    return Response(form.whole(pieces, counter.usage).model_dump_json(), media_type="application/json")


async def _events(
    answerer: Answerer, choices: Sequence[Choice], asked: SamplingFields, form: Format
) -> AsyncGenerator[str, None]:
    """Events; once one has left, a failure is an event too."""
    counter, options, begun = Counter(choices, asked), asked.stream_options, False
    with_usage = bool(options and options.continuous_usage_stats)
    try:
        async with aclosing(answerer.answer(choices, whole=False)) as answer:
            async for piece in answer:
                counter.add(piece)
                opening = [] if begun else form.opening()
                begun = True
                for event in (*opening, form.event(piece, counter.usage if with_usage else None)):
                    yield _event(_json(event))
    except Exception as error:
        if not begun:
            raise
        if not isinstance(error, ApiError):
            log.exception("an answer could not be finished")
            error = bug(error)
        yield _event(error.body())
    else:
        if options and options.include_usage:
            yield _event(_json(form.last_event(counter.usage)))
    yield _event("[DONE]")


def _json(event: BaseModel) -> str:
    """ASCII: some clients take U+2028 and its like in a text for the end of a line."""
    return event.model_dump_json(ensure_ascii=True)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


class EventStream(Response):
    """Sends `first`, then what `rest` yields, and closes `rest` at once however it ends."""

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        self.status_code, self.background = 200, None
        self._first, self._rest = first, rest
        self.init_headers({"Cache-Control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
            async for event in self._rest:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def now() -> int:
    """Seconds since 1970, as OpenAI dates its objects."""
    return int(time.time())
