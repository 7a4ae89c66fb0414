"""An engine in an event loop of its own, for tests that are not asynchronous themselves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from triaxial.serve.engine import Engine
from triaxial.serve.request import Chunk, Request, Sampling, TokenLogprob
from triaxial.serve.settings import EngineSettings

Result = TypeVar("Result")

LIMIT_S = 120


@dataclass
class Answer:
    """Everything that one request was given."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        assert self.finish_reason is None
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs
        self.prompt_logprobs += chunk.prompt_logprobs
        self.finish_reason = chunk.finish_reason


class Driver:
    """Starts an engine and runs coroutines beside it."""

    def __init__(self, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.engine = Engine(EngineSettings(**{"precision": "fp32", "kv_memory": 64 << 20} | settings))
        self.run(self.engine.start())

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    def answer(self, prompt: Sequence[int], **sampling: Any) -> Answer:
        return self.answers([(prompt, sampling)])[0]

    def answers(self, requests: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> list[Answer]:
        """All of them at once, in one batch as far as they fit."""

        async def together() -> list[Answer]:
            return await asyncio.gather(*(collect(self.engine, prompt, **s) for prompt, s in requests))

        return self.run(together())

    def close(self) -> None:
        self.run(self.engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)
        self._loop.close()


async def collect(engine: Engine, prompt: Sequence[int], **sampling: Any) -> Answer:
    answer = Answer()
    async for chunk in engine.generate(Request("test", tuple(prompt), Sampling(**sampling))):
        answer.add(chunk)
    return answer
