"""What clients see when engines fail."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator

import openai
import pytest

from tests.serve.fake_engine import FakeEngine
from tests.serve.live import HTTP, NAME, client, error, live, post, until
from triaxial.serve.request import Chunk, Request


def test_a_death_before_the_first_token_is_not_seen_by_the_client() -> None:
    with live(lambda: FakeEngine(prompt_delay_s=0.3), replicas=2) as server:
        ai = client(server.url)
        answers: list[str] = []
        asking = threading.Thread(
            target=lambda: answers.append(ai.completions.create(model=NAME, prompt="a", max_tokens=3).choices[0].text)
        )
        asking.start()
        until(lambda: server.active == 1)
        server.fail(next(i for i, engines in enumerate(server.engines) if engines[0].active))
        asking.join(10)
        assert answers == ["bcd"]


def test_a_death_in_a_stream_is_a_clear_error_event() -> None:
    with live(lambda: FakeEngine(delay_s=0.02)) as server:
        stream = client(server.url).completions.create(model=NAME, prompt="a", max_tokens=100, stream=True)
        next(iter(stream))
        server.fail(0, "rank 1: ended by SIGKILL")
        with pytest.raises(openai.APIError, match="rank 1: ended by SIGKILL"):
            list(stream)
        health = HTTP.get(server.url + "/health")
        assert health.status_code == 503
        assert health.json()["replicas"] == [{"replica": 0, "state": "restarting", "cause": "rank 1: ended by SIGKILL"}]
        until(lambda: HTTP.get(server.url + "/health").status_code == 200)
        assert post(server, prompt="a", max_tokens=1).status_code == 200


def test_a_bug_in_a_stream_is_an_error_event_that_tells_nothing() -> None:
    with live(lambda: Buggy(delay_s=0.001)) as server:
        text = post(server, prompt="a", max_tokens=9, stream=True).text
        assert text.endswith(
            '"internal error: ZeroDivisionError", "type": "server_error", "param": null, "code": null}}\n\ndata: [DONE]\n\n'
        )
        assert error(post(server, prompt="a", max_tokens=9)) == (500, "internal error: ZeroDivisionError")


class Buggy(FakeEngine):
    """Gives a token, and then raises what no engine should."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk((65,))
        raise ZeroDivisionError("secret")


def test_while_draining_new_requests_get_503_and_old_ones_finish() -> None:
    with live(lambda: FakeEngine(delay_s=0.02)) as server:
        stream = client(server.url).completions.create(model=NAME, prompt="a", max_tokens=20, stream=True)
        next(iter(stream))
        server.house.draining = True
        assert error(post(server, prompt="a")) == (503, "the server is shutting down")
        assert HTTP.get(server.url + "/health").json()["status"] == "draining"
        assert len(list(stream)) == 19
