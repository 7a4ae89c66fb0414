"""What the server refuses, and what it does about clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import openai
import pytest

from tests.serve.fake_engine import FakeEngine
from tests.serve.live import HTTP, NAME, Live, client, error, live, post, until
from triaxial.serve import gate
from triaxial.serve.limits import Limits
from triaxial.serve.served import Served


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(lambda: FakeEngine(delay_s=0.001)) as it:
        yield it


@pytest.fixture(scope="module")
def ai(server: Live) -> openai.OpenAI:
    return client(server.url)


# Refusals

BAD = {
    "prompt": [
        {},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [-1]},
        {"prompt": [256]},
        {"prompt": [["a"]]},
        {"prompt": 5},
    ],
    "max_tokens": [
        {"prompt": "a", "max_tokens": -1},
        {"prompt": "a", "max_tokens": 200},
        {"prompt": "a", "max_tokens": "5"},
    ],
    "temperature": [{"prompt": "a", "temperature": 3}, {"prompt": "a", "temperature": -0.1}],
    "top_p": [{"prompt": "a", "top_p": 0}],
    "n": [{"prompt": "a", "n": 0}, {"prompt": "a", "n": 129}],
    "stop": [{"prompt": "a", "stop": [""]}],
    "logprobs": [{"prompt": "a", "logprobs": 21}],
    "logit_bias": [{"prompt": "a", "logit_bias": {"x": 1}}, {"prompt": "a", "logit_bias": {"256": 1}}],
    "stop_token_ids": [{"prompt": "a", "stop_token_ids": [256]}],
    "best_of": [{"prompt": "a", "best_of": 2}],
    "suffix": [{"prompt": "a", "suffix": "b"}],
    "151 tokens": [{"prompt": "a" * 151}],
    "sequences": [{"prompt": ["a"] * 2048, "n": 128}],
}


@pytest.mark.parametrize(("word", "fields"), [(word, fields) for word, cases in BAD.items() for fields in cases])
def test_a_bad_field_is_named(server: Live, word: str, fields: dict[str, object]) -> None:
    status, message = error(post(server, **fields))
    assert status == 400
    assert word in message


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("no such role: tool", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages", {"messages": []}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("tools", {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}),
        (
            "response_format",
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
        ),
    ],
)
def test_a_bad_conversation_is_refused(server: Live, word: str, fields: dict[str, object]) -> None:
    status, message = error(post(server, "/v1/chat/completions", **fields))
    assert status == 400
    assert word in message


def test_without_a_tokenizer_only_token_ids_are_taken() -> None:
    with live(served=Served("bare", 256, 200, 150)) as server:
        assert error(post(server, prompt="a")) == (400, "bare has no tokenizer: use token ids as the prompt")
        status, message = error(post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}]))
        assert (status, message) == (400, "bare has no chat template: use /v1/completions")
        choice = post(server, prompt=[65], max_tokens=2, logprobs=1, echo=True).json()["choices"][0]
        assert (choice["text"], choice["logprobs"]["tokens"]) == ("", ["token_id:65", "token_id:66", "token_id:67"])


def test_errors_are_openais(ai: openai.OpenAI, server: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="there is counting"):
        ai.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        ai.completions.create(model=NAME, prompt="a", max_tokens=500)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "max_tokens"
    assert error(HTTP.get(server.url + "/v1/nothing"))[0] == 404
    assert error(HTTP.get(server.url + "/v1/completions"))[0] == 405
    not_json = HTTP.post(server.url + "/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert error(not_json)[0] == 400


# Limits and clients that go away


def test_a_large_body_is_refused_before_it_is_read() -> None:
    with live(limits=Limits(max_body_bytes=1000)) as server:
        assert post(server, prompt="a" * 100, max_tokens=1).status_code == 200
        assert error(post(server, prompt="a" * 1000)) == (413, "the body is larger than 1000 bytes")

        def parts() -> Iterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        assert error(HTTP.post(server.url + "/v1/completions", content=parts()))[0] == 413


def test_a_body_that_does_not_come_is_not_waited_for(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_LIMIT_S", 0.1)
    with socket.create_connection(server.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        connection.settimeout(20)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_an_answer_that_nobody_reads_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "READ_LIMIT_S", 0.1)

    async def app(*_: object) -> None:  # its client does not take what is sent
        await asyncio.sleep(100)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0 if not bodies else 100)
        bodies.append(b"")
        return {"type": "http.request", "body": b"", "more_body": False}

    bodies: list[bytes] = []
    door = gate.Gate(app, limits=Limits(timeout_s=0.1), api_key=None, draining=lambda: False)
    scope = {"type": "http", "path": "/health", "headers": []}
    asyncio.run(asyncio.wait_for(door(scope, receive, app), 20))


def test_the_queue_frees_its_places() -> None:
    with live(lambda: FakeEngine(delay_s=0.02), limits=Limits(max_queue=2), places=1) as server:
        ai = client(server.url)
        streams = [ai.completions.create(model=NAME, prompt="a", max_tokens=20, stream=True) for _ in range(3)]
        refused = post(server, prompt="a")
        assert error(refused) == (429, "the queue is full (2 sequences wait): try again later")
        assert int(refused.headers["retry-after"]) > 0
        assert [len(list(stream)) for stream in streams] == [20, 20, 20]
        assert post(server, prompt="a", max_tokens=1).status_code == 200


def test_too_many_requests_at_once_are_refused() -> None:
    with live(lambda: FakeEngine(delay_s=0.05), limits=Limits(max_concurrent=1)) as server:
        stream = client(server.url).completions.create(model=NAME, prompt="a", stream=True)
        next(iter(stream))
        assert error(post(server, prompt="a"))[0] == 429
        stream.close()


def test_an_answer_that_takes_too_long_ends() -> None:
    with live(lambda: FakeEngine(delay_s=0.05), limits=Limits(timeout_s=0.2)) as server:
        assert error(post(server, prompt="a", max_tokens=100)) == (408, "the answer was not complete after 0.2 s")
        with pytest.raises(openai.APIError, match=r"not complete after 0.2 s"):
            list(client(server.url).completions.create(model=NAME, prompt="a", max_tokens=100, stream=True))
        until(lambda: server.active == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("slow", ["prompt", "answer"])
def test_a_client_that_goes_away_frees_its_blocks(stream: bool, slow: str) -> None:
    delay = {"prompt_delay_s": 30.0} if slow == "prompt" else {"delay_s": 0.02}
    with live(lambda: FakeEngine(**delay)) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 150, "n": 2, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(server.address) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: server.active == 2)
            if stream and slow == "answer":
                assert connection.recv(1000)
        until(lambda: server.active == 0, within_s=2)


def test_cancelling_with_the_client_frees_blocks() -> None:
    with live(lambda: FakeEngine(delay_s=0.02)) as server:
        stream = client(server.url).chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "x"}], stream=True
        )
        next(iter(stream))
        assert server.active == 1
        stream.close()
        until(lambda: server.active == 0, within_s=2)


# The key


def test_the_key_is_needed_for_models_and_answers_only() -> None:
    with live(api_key="s3cret") as server:
        assert client(server.url, api_key="s3cret").models.list().data[0].id == NAME
        for wrong in ("none", "s3cre", "s3cret2"):
            with pytest.raises(openai.AuthenticationError):
                client(server.url, api_key=wrong).models.list()
        refused = HTTP.post(server.url + "/v1/completions", content=b"not read")
        assert error(refused)[0] == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert [HTTP.get(server.url + path).status_code for path in ("/health", "/metrics", "/version")] == [200] * 3
