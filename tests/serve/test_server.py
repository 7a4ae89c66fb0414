"""What the server answers, to OpenAI's own client and to plain HTTP, over real sockets; engines are fake.

The fake engine counts up through printable ASCII and the tokenizer is bytes, so every answer is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.serve.fake_engine import FakeEngine
from tests.serve.live import HTTP, NAME, Live, client, live, post


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(lambda: FakeEngine(delay_s=0.001)) as it:
        yield it


@pytest.fixture(scope="module")
def ai(server: Live) -> openai.OpenAI:
    return client(server.url)


# Completions


def test_completion_of_a_text(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model=NAME, prompt="abc", max_tokens=4)
    assert answer.object == "text_completion"
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [(0, "defg", "length", None)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)


def test_max_tokens_is_16_unless_given(ai: openai.OpenAI) -> None:
    assert ai.completions.create(model=NAME, prompt=[33]).choices[0].text == "".join(map(chr, range(34, 50)))


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ([97, 98], ["cd"]),
        (["a", "k"], ["bc", "lm"]),
        ([[97], [98, 107]], ["bc", "lm"]),
    ],
)
def test_prompts_are_text_token_ids_or_lists_of_them(ai: openai.OpenAI, prompt: list[int], texts: list[str]) -> None:
    answer = ai.completions.create(model=NAME, prompt=prompt, max_tokens=2)
    assert [choice.text for choice in answer.choices] == texts


def test_n_gives_choices_with_seeds_of_their_own_and_counts_the_prompt_once(server: Live, ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model=NAME, prompt=["ab", "xy"], n=2, max_tokens=3, seed=7)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "cde"), (1, "cde"), (2, "z{|"), (3, "z{|")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)
    assert [r.sampling.seed for r in server.engines[0][0].requests[-4:]] == [7, 8, 7, 8]


def test_an_end_of_sequence_ends_the_answer_unless_ignored(ai: openai.OpenAI) -> None:
    assert ai.completions.create(model=NAME, prompt="{", max_tokens=9).choices[0].finish_reason == "stop"
    ignoring = ai.completions.create(model=NAME, prompt="{", max_tokens=9, extra_body={"ignore_eos": True})
    assert (ignoring.choices[0].text[:4], ignoring.choices[0].finish_reason) == ("|}~ ", "length")


def test_a_stop_text_is_cut_off_and_ends_the_work(server: Live, ai: openai.OpenAI) -> None:
    choice = ai.completions.create(model=NAME, prompt="a", max_tokens=20, stop=["zz", "efg"]).choices[0]
    assert (choice.text, choice.finish_reason) == ("bcd", "stop")
    assert server.active == 0


def test_stop_token_ids_and_sampling_fields_reach_the_engine(server: Live, ai: openai.OpenAI) -> None:
    extra = {"stop_token_ids": [100], "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2}
    answer = ai.completions.create(
        model=NAME, prompt="a", max_tokens=9, temperature=0.5, top_p=0.9, presence_penalty=1, frequency_penalty=-1,
        logit_bias={"65": -100}, seed=-3, extra_body=extra,
    )  # fmt: skip
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("bcd", "stop")
    s = server.engines[0][0].requests[-1].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (
        0.5, 0.9, 5, 0.1, 1.2, 1, -1,
    )  # fmt: skip
    assert (s.logit_bias, s.seed, s.min_tokens, s.stop_token_ids) == ({65: -100}, -3, 2, (100,))


def test_logprobs_of_prompt_and_answer(ai: openai.OpenAI) -> None:
    choice = ai.completions.create(model=NAME, prompt=[97, 98], max_tokens=2, echo=True, logprobs=2).choices[0]
    assert choice.text == "abcd"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "c", "d"]
    assert choice.logprobs.token_logprobs == [None, -98 / 256, -99 / 256, -100 / 256]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.top_logprobs[3] == {"d": -100 / 256, "c": -100 / 256 - 1}
    assert choice.logprobs.text_offset == [0, 1, 2, 3]


def test_the_prompt_alone_can_be_scored(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model=NAME, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_a_stream_gives_the_same_text_and_logprobs_as_the_whole(ai: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": ["a", "xy"], "max_tokens": 6, "logprobs": 1, "echo": True, "stop": "zq", "n": 2}
    whole = ai.completions.create(**asked)
    chunks = list(ai.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [offset for part in parts for offset in part.logprobs.text_offset] == choice.logprobs.text_offset
        assert [token for part in parts for token in part.logprobs.tokens] == choice.logprobs.tokens
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
        assert len(parts) >= 5


def test_usage_can_come_with_every_event(ai: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = ai.completions.create(model=NAME, prompt="a", max_tokens=3, stream=True, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 3]


def test_a_stream_is_server_sent_events_that_end_with_done(server: Live) -> None:
    response = post(server, prompt="a", max_tokens=2, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]] == ["b", "c"]


def test_no_text_can_break_a_line_of_the_stream(server: Live) -> None:
    text = "a\u2028b\x85c\x1cd\x0be\r\nf"
    with HTTP.stream(
        "POST", server.url + "/v1/completions", json={"prompt": text, "echo": True, "stream": True}
    ) as answer:
        first = next(answer.iter_lines())
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == text + "g"


# Chat


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model=NAME,
        messages=[{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        max_completion_tokens=3,
    )
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", "?@A", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<system>x<user>hi<assistant>")


def test_chat_goes_on_to_the_end_of_the_context_unless_told(ai: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = ai.chat.completions.create(model=NAME, messages=messages, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 200


def test_chat_stream_and_logprobs(ai: openai.OpenAI) -> None:
    asked = {
        "model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 2,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = ai.chat.completions.create(**asked)
    assert whole.choices[0].logprobs.content[0].token == "?"
    assert whole.choices[0].logprobs.content[0].bytes == [63]
    assert [top.token for top in whole.choices[0].logprobs.content[0].top_logprobs] == ["?", ">"]
    chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    parts = [c for chunk in chunks for c in chunk.choices if c.index == 1]
    assert [part.delta.role for part in parts] == ["assistant", None, None, None]
    assert "".join(part.delta.content for part in parts) == "?@A"
    assert [one for part in parts[1:] for one in part.logprobs.content] == whole.choices[1].logprobs.content


def test_clients_helper_for_streams_understands_ours(ai: openai.OpenAI) -> None:
    with ai.chat.completions.stream(model=NAME, messages=[{"role": "user", "content": "hi"}], stop="C") as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", "?@AB")


# The other paths


def test_models_version_and_health(server: Live, ai: openai.OpenAI) -> None:
    assert [(model.id, model.object, model.max_model_len) for model in ai.models.list()] == [(NAME, "model", 200)]
    assert ai.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("org/other")
    assert HTTP.get(server.url + "/version").json() == {"version": "0.1.0"}
    assert HTTP.get(server.url + "/health").json()["status"] == "ready"


def test_metrics_have_the_names_that_dashboards_know(server: Live, ai: openai.OpenAI) -> None:
    def value(name: str) -> float:
        lines = HTTP.get(server.url + "/metrics").text.splitlines()
        return float(
            next(line.split()[-1] for line in lines if line.startswith(f'{name}{{engine="0",model_name="{NAME}"'))
        )

    before = value("vllm:generation_tokens_total")
    ai.completions.create(model=NAME, prompt="a", max_tokens=5)
    assert value("vllm:generation_tokens_total") == before + 5
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert value(f"vllm:{name}") == 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert value(f"vllm:{name}_count") > 0
