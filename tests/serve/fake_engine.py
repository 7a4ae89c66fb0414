"""An engine without a model: its tokens follow from the prompt, it takes its time, and it can be made to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from triaxial import BadInput
from triaxial.serve.request import Chunk, EngineFailed, EngineStats, Request, TokenLogprob

VOCAB = 256
END = 0


class FakeEngine:
    """Counts up from the prompt's last token, within printable ASCII. `~` (126) is its end of sequence."""

    def __init__(self, delay_s: float = 0.0, fails_to_start: str | None = None, prompt_delay_s: float = 0.0) -> None:
        self.delay_s, self.prompt_delay_s, self._fails_to_start = delay_s, prompt_delay_s, fails_to_start
        self.requests: list[Request] = []
        self.active: set[str] = set()
        self.cause: asyncio.Future[str] | None = None
        self.stopped = False

    async def start(self) -> None:
        await asyncio.sleep(0)
        if self._fails_to_start:
            raise EngineFailed(self._fails_to_start)
        self.cause = asyncio.get_running_loop().create_future()

    def fail(self, cause: str = "rank 1: ended by SIGKILL") -> None:
        assert self.cause is not None
        if not self.cause.done():
            self.cause.set_result(cause)

    async def wait_failed(self) -> str:
        assert self.cause is not None
        return await asyncio.shield(self.cause)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.active), 0, len(self.active), 100, 0)

    async def stop(self) -> None:
        self.stopped = True
        if self.cause is not None and not self.cause.done():
            self.fail("the engine was stopped")

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        s, prompt = request.sampling, request.prompt
        if s.max_tokens > 10_000:
            raise BadInput("more tokens than the KV cache holds")
        self.requests.append(request)
        self.active.add(request.id)
        try:
            await self._wait(self.prompt_delay_s)
            scored = (
                tuple(_scored(token, s.prompt_logprobs) for token in prompt[1:])
                if s.prompt_logprobs is not None
                else ()
            )
            token = prompt[-1]
            for n in range(s.max_tokens):
                await self._wait(self.delay_s)
                token = following(token)
                ended = token in s.stop_token_ids or (token == 126 and not s.ignore_eos)
                finish = "stop" if ended else "length" if n + 1 == s.max_tokens else None
                logprobs = () if s.logprobs is None else (_scored(token, s.logprobs),)
                yield Chunk((token,), logprobs, scored, finish)
                scored = ()
                if ended:
                    return
        finally:
            self.active.discard(request.id)

    async def _wait(self, seconds: float) -> None:
        """Sleep, unless the engine fails meanwhile."""
        assert self.cause is not None
        await asyncio.wait((self.cause,), timeout=seconds) if seconds else await asyncio.sleep(0)
        if self.cause.done():
            raise EngineFailed(self.cause.result())


def following(token: int) -> int:
    return 32 + (token - 31) % 95


def _scored(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -token / 256, tuple((token - i, -token / 256 - i) for i in range(top)))
