"""SIGTERM: what runs is finished within a bound, what comes is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time

import httpx2 as httpx
import openai

from tests.serve.fake_engine import FakeEngine
from tests.serve.live import HTTP, NAME, client, make_house, until
from triaxial.serve.process import until_drained


class Client(threading.Thread):
    """Streams `count` tokens, sends this process a signal after the first one, and notes what comes of it."""

    def __init__(self, url: str, count: int, signals: int = 1) -> None:
        super().__init__(daemon=True)
        self.url, self.count, self._signals = url, count, signals
        self.tokens, self.error, self.late, self.health = 0, "", 0, 0
        self.start()

    def run(self) -> None:
        until(lambda: _listens(self.url))
        try:
            stream = client(self.url).completions.create(
                model=NAME, prompt="a", max_tokens=self.count, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in stream:
                self.tokens += 1
                if self.tokens == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                    until(lambda: HTTP.get(self.url + "/health").status_code == 503)
                    self.late = HTTP.post(self.url + "/v1/completions", json={"prompt": "a"}).status_code
                    if self._signals == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
        except openai.APIError as error:
            self.error = str(error)


def _listens(url: str) -> bool:
    try:
        return HTTP.get(url + "/health").status_code == 200
    except httpx.HTTPError:
        return False


def drain(count: int, drain_s: float, signals: int = 1) -> tuple[Client, float]:
    """Serve until the client's signal has ended the server; the client, and the seconds that it all took."""

    async def serve() -> Client:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            async with make_house(lambda _: FakeEngine(delay_s=0.02)) as house:
                asking = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", count, signals)
                await until_drained(house, listener, drain_s)
        await asyncio.to_thread(asking.join, 20)
        assert not asking.is_alive()
        return asking

    begin = time.monotonic()
    return asyncio.run(serve()), time.monotonic() - begin


def test_what_runs_is_finished_and_what_comes_gets_503() -> None:
    asking, _ = drain(count=40, drain_s=30)
    assert (asking.tokens, asking.error, asking.late) == (40, "", 503)


def test_what_takes_longer_than_the_bound_ends_with_a_clear_error() -> None:
    asking, seconds = drain(count=190, drain_s=0.3)
    assert 1 < asking.tokens < 190
    assert "shutting down" in asking.error
    assert seconds < 15


def test_a_second_signal_does_not_wait() -> None:
    asking, seconds = drain(count=190, drain_s=1000, signals=2)
    assert asking.tokens < 190
    assert asking.error
    assert seconds < 15
