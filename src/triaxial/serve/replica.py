"""One replica: an engine that is watched and started again when it fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Literal, Protocol

from triaxial.serve.metrics import Metrics
from triaxial.serve.request import Chunk, EngineFailed, EngineStats, Request

START_LIMIT_S = 600
"""For an engine to load its model."""
STOP_LIMIT_S = 10
FIRST_BACKOFF_S = 0.5
"""Before the first restart; doubles with every failure in a row."""
FAILURES_IN_A_ROW = 5
"""After so many the replica is given up."""
HEALTHY_S = 30
"""An engine that lived so long starts a new count of failures."""

log = logging.getLogger("triaxial.serve")

State = Literal["starting", "ready", "restarting", "given up", "stopped"]


class Engine(Protocol):
    """What a replica needs of an engine."""

    async def start(self) -> None:
        """Return when all ranks are ready.

        Raises:
            BadInput: the model or the layout cannot be run here.
            EngineFailed: a rank ended.
        """

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """An asynchronous generator of tokens as they come; closing it frees the request's blocks.

        Raises:
            BadInput: the engine can never answer this.
            EngineFailed: the engine died.
        """

    def stats(self) -> EngineStats: ...

    async def stop(self) -> None:
        """End all ranks; no process is left."""

    async def wait_failed(self) -> str:
        """Return, when the engine fails, which rank did and why."""


class Replica:
    """Keeps one engine running. `changed` is called whenever the state does."""

    def __init__(self, index: int, make: Callable[[], Engine], metrics: Metrics, changed: Callable[[], None]) -> None:
        self.index = index
        self.state: State = "starting"
        self.cause: str | None = None
        """Why it is not ready, or why it last failed."""
        self.outstanding = 0
        """Tokens yet to be read or written for the requests it holds."""
        self._make, self._metrics, self._changed = make, metrics, changed
        self._engine = make()

    async def start(self) -> None:
        """Start the first engine; what keeps it from starting is the caller's to tell."""
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._engine.start()
        except TimeoutError:
            raise EngineFailed(f"the engine did not start within {START_LIMIT_S} s") from None
        self._set("ready")

    async def keep_running(self) -> None:
        """Until cancelled, or until the engine has failed too often in a row."""
        failures, began = 0, time.monotonic()
        cause = await self._engine.wait_failed()
        while True:
            failures = 1 if time.monotonic() - began > HEALTHY_S else failures + 1
            self._set("restarting", cause)
            log.error("replica %d: %s", self.index, cause)
            await self._end_engine()
            if failures >= FAILURES_IN_A_ROW:
                self._set("given up", cause)
                log.error("replica %d failed %d times in a row: given up", self.index, failures)
                return
            await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (failures - 1))
            began = time.monotonic()
            cause = await self._next_life()

    async def _next_life(self) -> str:
        """Start a new engine; return why it ended."""
        self._engine = self._make()
        self._metrics.restarts(self.index).inc()
        try:
            await self.start()
        except Exception as error:  # whatever keeps an engine from starting is the cause to tell
            return str(error)
        log.warning("replica %d is ready again", self.index)
        return await self._engine.wait_failed()

    async def stop(self) -> None:
        self._set("stopped", "the server is shutting down")
        await self._end_engine()

    async def _end_engine(self) -> None:
        with suppress(TimeoutError, EngineFailed):
            async with asyncio.timeout(STOP_LIMIT_S):
                await self._engine.stop()

    def _set(self, state: State, cause: str | None = None) -> None:
        self.state = state
        self.cause = cause or self.cause
        self._changed()

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats() if self.ready else EngineStats(0, 0, 0, 0, 0)

    async def generate(self, request: Request, arrived: float) -> AsyncGenerator[Chunk, None]:
        """The engine's chunks, counted. `arrived` is when the server got the request, in monotonic seconds.

        Raises:
            EngineFailed: the engine is not running, or died meanwhile.
        """
        if not self.ready:
            raise EngineFailed(self.cause or f"replica {self.index} is {self.state}")
        engine, prompt = self._engine, len(request.prompt)
        left = prompt + request.sampling.max_tokens
        self.outstanding += left
        try:
            with self._metrics.observe(self.index, prompt, arrived) as observe:
                chunks = engine.generate(request)
                assert isinstance(chunks, AsyncGenerator)
                async with aclosing(chunks):
                    async for chunk in chunks:
                        now = request.sampling.max_tokens - observe.generated - len(chunk.tokens)
                        self.outstanding, left = self.outstanding - left + now, now
                        observe(chunk)
                        yield chunk
        except EngineFailed as error:
            if self.state == "stopped":
                raise EngineFailed(str(self.cause)) from None
            if engine is self._engine and self.ready:  # we know before its keeper does
                self._set("restarting", str(error))
            raise
        finally:
            self.outstanding -= left
