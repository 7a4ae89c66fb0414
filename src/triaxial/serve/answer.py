"""From sequences to be continued to pieces of text, however many there are and whatever becomes of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from triaxial import BadInput
from triaxial.serve.errors import ApiError
from triaxial.serve.limits import Door
from triaxial.serve.replicas import Replicas, retried
from triaxial.serve.request import EngineFailed, FinishReason, Request, TokenLogprob
from triaxial.serve.text import TextStream, TextTokenizer

Item = TypeVar("Item")


@dataclass(frozen=True)
class Choice:
    """One sequence of a client's request."""

    index: int
    request: Request
    stop: tuple[str, ...] = ()
    """Texts that end it."""
    silent: bool = False
    """The client wants no token: only what is known of the prompt."""


@dataclass(frozen=True)
class Piece:
    """What has become known of a choice since its last piece."""

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


class Answerer:
    """Answers requests with the replicas' tokens."""

    def __init__(self, replicas: Replicas, tokenizer: TextTokenizer | None, door: Door, timeout_s: float) -> None:
        self._replicas, self._tokenizer, self._door, self._timeout_s = replicas, tokenizer, door, timeout_s

    async def answer(self, choices: Sequence[Choice], whole: bool) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come. Closing it ends them and frees their blocks.

        Args:
            whole: nothing is sent before the end, so choices can be begun again whenever their engine dies.

        Raises:
            ApiError: the house is full, the time is over or no engine can finish them.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        with self._door.enter(len(choices)):
            streams = [retried(lambda choice=choice: self._pieces(choice), whole) for choice in choices]  # type: ignore[misc]
            try:
                async with aclosing(merged(streams, deadline)) as pieces:
                    async for piece in pieces:
                        yield piece
            except TimeoutError:
                raise ApiError(408, f"the answer was not complete after {self._timeout_s:g} s") from None
            except BadInput as error:
                raise ApiError(400, str(error)) from None
            except EngineFailed as error:
                raise ApiError(503, str(error), code="engine_failed") from None

    async def _pieces(self, choice: Choice) -> AsyncGenerator[Piece, None]:
        text = TextStream(self._tokenizer, choice.stop, choice.request.sampling.min_tokens)
        async with aclosing(self._replicas.generate(choice.request)) as chunks:
            async for chunk in chunks:
                if choice.silent:
                    yield Piece(choice.index, "", 0, (), chunk.prompt_logprobs, "length")
                    return
                new = text.add(chunk.tokens, last=chunk.finish_reason is not None)
                finish: FinishReason | None = "stop" if text.stopped else chunk.finish_reason
                tokens, logprobs = len(chunk.tokens), chunk.logprobs
                yield Piece(choice.index, new, tokens, logprobs, chunk.prompt_logprobs, finish)
                if finish:
                    return


async def merged(streams: Sequence[AsyncGenerator[Item, None]], deadline: float) -> AsyncGenerator[Item, None]:
    """Items of all streams as they come, each stream in a task of its own; the first exception ends them all.

    Args:
        deadline: when to give up, in the event loop's time.

    Raises:
        TimeoutError: the deadline has passed.
    """
    queue: asyncio.Queue[Item | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    left = len(tasks)
    try:
        while left:
            async with asyncio.timeout_at(deadline):
                item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[Item, None], queue: asyncio.Queue[Item | Exception | None]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait(item)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
