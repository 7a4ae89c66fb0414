"""A server over real sockets with engines that are fake, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2 as httpx
import uvicorn
from openai import OpenAI

from tests.serve.fake_engine import VOCAB, FakeEngine
from triaxial.serve.limits import Limits
from triaxial.serve.metrics import Metrics
from triaxial.serve.replicas import Replicas
from triaxial.serve.served import Served
from triaxial.serve.server import House, build_app
from triaxial.serve.template import ChatTemplate
from triaxial.serve.text import ByteTokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
NAME = "counting"
HTTP = httpx.Client(timeout=60)
"""Made once: a client loads certificates, which takes longer than most answers."""


class Live:
    """`engines[i]` are the engines that replica i has had, the newest last."""

    def __init__(self, make: Callable[[], FakeEngine], replicas: int, **house: Any) -> None:
        self.engines: list[list[FakeEngine]] = [[] for _ in range(replicas)]
        self._make, self._replicas, self._options = make, replicas, house
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    async def _run(self) -> None:
        async with make_house(self._engine, self._replicas, **self._options) as self.house:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                self.address = listener.getsockname()
                self.url = f"http://127.0.0.1:{self.address[1]}"
                self._server = uvicorn.Server(
                    uvicorn.Config(
                        build_app(self.house), log_level="error", lifespan="off", timeout_graceful_shutdown=1
                    )
                )
                self._loop = asyncio.get_running_loop()
                ready = asyncio.create_task(self._tell_ready())
                await self._server.serve([listener])
                await ready

    async def _tell_ready(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.005)
        self._ready.set()

    def _engine(self, index: int) -> FakeEngine:
        self.engines[index].append(self._make())
        return self.engines[index][-1]

    @property
    def active(self) -> int:
        """Requests that engines hold."""
        return sum(len(engine.active) for engines in self.engines for engine in engines)

    def fail(self, replica: int, cause: str = "rank 1: ended by SIGKILL") -> None:
        self._loop.call_soon_threadsafe(self.engines[replica][-1].fail, cause)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@asynccontextmanager
async def make_house(make: Callable[[int], FakeEngine], replicas: int = 1, **options: Any) -> AsyncIterator[House]:
    """A house of fake engines; its model has 256 tokens, which are bytes, and 200 positions."""
    served = Served(NAME, VOCAB, 200, 150, ByteTokenizer(), ChatTemplate(TEMPLATE, {}))
    metrics = Metrics(NAME)
    async with Replicas(make, replicas, metrics) as running:
        given = {"served": served, "limits": Limits(), "places": 4} | options
        yield House(replicas=running, metrics=metrics, **given)


@contextmanager
def live(make: Callable[[], FakeEngine] = FakeEngine, replicas: int = 1, **house: Any) -> Iterator[Live]:
    server = Live(make, replicas, **house)
    try:
        yield server
    finally:
        server.stop()


def client(url: str, **more: Any) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | more)


def until(condition: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


def post(server: Live, path: str = "/v1/completions", **fields: object) -> httpx.Response:
    return HTTP.post(server.url + path, json=fields)


def error(response: httpx.Response) -> tuple[int, str]:
    """Status and message of an answer that must be OpenAI's error body."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return response.status_code, body["error"]["message"]
