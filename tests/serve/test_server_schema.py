"""The server against its own description, and against bodies that no client means to send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serve.bodies import SETTINGS, allowed, check_answer, nonsense, spoiled
from tests.serve.fake_engine import FakeEngine
from tests.serve.live import HTTP, Live, live
from triaxial.serve.limits import Limits


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(FakeEngine, limits=Limits(max_queue=1000, timeout_s=20)) as it:
        yield it


POSTS = ["/v1/completions", "/v1/chat/completions"]
GETS = ["/v1/models", "/v1/models/{name}", "/health", "/version", "/metrics"]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [*(("POST", path, mode) for path in POSTS for mode in (RIGHT, WRONG)), *(("GET", path, RIGHT) for path in GETS)],
)
def test_the_server_does_what_its_description_says(server: Live, method: str, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(server.url + "/openapi.json")[path][method]

    @settings(max_examples=20, **SETTINGS)
    @given(case=operation.as_strategy(mode))
    def check(case: schemathesis.Case) -> None:
        # What the schema allows can still be too long for this model, or name a token or model that it has not.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


@settings(max_examples=80, **SETTINGS)
@given(allowed)
def test_what_is_allowed_is_answered(server: Live, request_: tuple[str, Any]) -> None:
    check_answer(server.url, *request_, statuses=(200,))


@settings(max_examples=120, **SETTINGS)
@given(spoiled | nonsense)
def test_any_body_is_answered_with_a_success_or_a_clear_error(server: Live, request_: tuple[str, Any]) -> None:
    check_answer(server.url, *request_, statuses=(200, 400, 404))


@settings(max_examples=100, **SETTINGS)
@given(
    content=st.binary(max_size=60) | st.sampled_from([b"[" * 100_000, b'{"prompt":' + b"9" * 6000 + b"}", b"\xff{}"])
)
def test_any_bytes_are_a_clear_error(server: Live, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = HTTP.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_after_all_that_nothing_is_left(server: Live) -> None:
    assert server.active == 0
    assert server.house.door.requests == 0
    assert HTTP.get(server.url + "/health").status_code == 200
