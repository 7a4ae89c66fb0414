"""Requests at and beyond the edges of what is allowed, and what a server may answer to them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck
from hypothesis import strategies as st

from tests.serve.live import HTTP
from triaxial.serve.protocol import ChatRequest, CompletionRequest

SETTINGS: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
}  # fmt: skip

any_text = st.text(st.characters(), max_size=20)
"""Halves of surrogate pairs too, which JSON as Python reads it can hold."""
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
"""NaN and numbers of any size too."""
token = st.integers(0, 255)
stop = st.text(min_size=1, max_size=3)
INT64 = 1 << 63

sampling: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "x": any_json}),
    "stop": stop | st.lists(stop, max_size=3),
    "seed": st.integers(-INT64, INT64 - 1),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, INT64 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(token.map(str), st.floats(-100, 100), max_size=3),
    "stop_token_ids": st.lists(token, max_size=3),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 60),
    "user": st.none() | st.text(max_size=3),
}
completions = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=20) | st.lists(token, min_size=1, max_size=20)},
    optional=sampling
    | {"max_tokens": st.integers(0, 40), "echo": st.booleans(), "logprobs": st.none() | st.integers(0, 20)},
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=9)}
)
chats = st.fixed_dictionaries(
    {"messages": st.lists(message, min_size=1, max_size=3), "max_tokens": st.integers(1, 40)},
    optional=sampling
    | {"logprobs": st.booleans(), "top_logprobs": st.integers(0, 20), "max_completion_tokens": st.integers(1, 40)},
)
allowed = st.tuples(st.just("completions"), completions) | st.tuples(st.just("chat/completions"), chats)

FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "guided_json", "x"})
wild = st.dictionaries(st.sampled_from(FIELDS), any_json, min_size=1, max_size=2)
spoiled = st.builds(lambda request, more: (request[0], request[1] | more), allowed, wild)
nonsense = st.tuples(st.sampled_from(["completions", "chat/completions"]), any_json)


def check_answer(url: str, path: str, body: Any, statuses: tuple[int, ...]) -> None:
    """A success or a clear error, soon."""
    content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    response = HTTP.post(f"{url}/v1/{path}", content=content, headers=headers)
    assert response.status_code in statuses, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif response.headers["content-type"] == "application/json":
        assert response.json()["choices"]
    else:
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text
