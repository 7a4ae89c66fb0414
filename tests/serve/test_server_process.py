"""`triaxial serve` with real ranks: what OpenAI's client gets is what transformers computes, and faults are survived."""

from __future__ import annotations

import math
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.command import TRIAXIAL
from tests.serve.bodies import SETTINGS, allowed, check_answer
from tests.serve.live import client, until
from tests.serve.model import make_model_folder
from tests.serve.process import Server, serving
from triaxial import BadInput
from triaxial.cli.serve import command

PROMPT = "The quick brown fox; naïve"
LIMIT_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


class Reference:
    """The same model in transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Of the next token, at each position: [tokens, vocab]."""
        return self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module", params=["tp=2,pp=1", "pp=2"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    with serving(folder, "--layout", request.param) as it:
        yield it


@pytest.fixture(scope="module")
def ai(server: Server) -> openai.OpenAI:
    return client(server.url)


def test_greedy_text_is_transformers(ai: openai.OpenAI, reference: Reference) -> None:
    prompt = reference.tokenizer.encode(PROMPT)
    expected = reference.tokenizer.decode(reference.greedy(prompt, 24), skip_special_tokens=True)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    for either in (PROMPT, prompt):
        assert ai.completions.create(prompt=either, **asked).choices[0].text == expected
    chunks = list(ai.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(prompt), 24)


def test_chat_uses_the_models_template(ai: openai.OpenAI, reference: Reference) -> None:
    messages = [
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "fox"},
        {"role": "user", "content": "12"},
    ]
    prompt = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = reference.greedy(prompt, 8)
    answer = ai.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage.prompt_tokens == len(prompt)
    logprobs = reference.logprobs(prompt + expected)[len(prompt) - 1 : -1]
    got = answer.choices[0].logprobs.content
    assert [one.logprob for one in got] == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)
    assert [one.token for one in got] == [
        reference.tokenizer.decode([token], skip_special_tokens=True) for token in expected
    ]


def test_log_likelihood_of_token_ids_is_transformers(ai: openai.OpenAI, reference: Reference) -> None:
    """What lm-eval asks: echo with logprobs, of several prompts at once."""
    prompts = [reference.tokenizer.encode(PROMPT)[:length] for length in (2, 7, 12)]
    answer = ai.completions.create(model="tiny", prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        expected = reference.logprobs(prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).flatten().tolist()
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        assert sum(map(math.isfinite, choice.logprobs.token_logprobs[1:])) == len(prompt)


def test_seeds_choices_and_stops(ai: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "n": 3, "seed": 5}
    first, again = (ai.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.text for choice in again.choices] == texts
    assert len(set(texts)) == 3
    other = [choice.text for choice in ai.completions.create(**asked | {"seed": 50}).choices]
    assert other != texts
    stop = texts[0][3:5]
    choice = ai.completions.create(**asked | {"n": 1}, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (texts[0].partition(stop)[0], "stop")


def test_cancelling_a_stream_frees_its_blocks_at_once(ai: openai.OpenAI, server: Server) -> None:
    stream = ai.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=200, n=8, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    stream.close()
    until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, LIMIT_S)
    assert server.metric("vllm:num_requests_running") == 0


def test_unknown_models_and_too_long_prompts_are_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(model="large", prompt="x")
    with pytest.raises(openai.BadRequestError, match="256"):
        ai.completions.create(model="tiny", prompt=[1] * 256)


@settings(max_examples=50, **SETTINGS)
@given(allowed)
def test_what_is_allowed_is_answered(server: Server, request_: tuple[str, Any]) -> None:
    check_answer(server.url, *request_, statuses=(200,))


def test_after_all_that_nothing_is_left(server: Server) -> None:
    assert server.health() == 200
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("triaxial:replica_restarts_total") == 0


# Faults: one server of two replicas, whose tests come in this order


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Server]:
    with serving(folder, "--layout", "dp=2", "--drain-timeout", "60") as it:
        yield it


def ask(url: str, answers: list[Any], **more: Any) -> threading.Thread:
    """Ask for a long answer in a thread; the answer or the error is added to `answers`."""

    def run() -> None:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "extra_body": {"ignore_eos": True}} | more
        try:
            answers.append(client(url).completions.create(**asked).choices[0].finish_reason)
        except openai.APIError as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_killed_rank_costs_its_streams_only(pair: Server) -> None:
    ai = client(pair.url)
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 220, "stream": True}
    streams = [ai.completions.create(**asked, extra_body={"ignore_eos": True}) for _ in range(2)]
    answers: list[Any] = []
    whole = [ask(pair.url, answers) for _ in range(4)]
    before = pair.ranks
    before[0].send_signal(signal.SIGKILL)
    outcomes: list[str] = []
    for stream in streams:
        try:
            outcomes.append(str(sum(len(chunk.choices) for chunk in stream)))
        except openai.APIError as error:
            outcomes.append(error.message)
    for thread in whole:
        thread.join(LIMIT_S)
    assert answers == ["length"] * 4  # nothing of them had been sent
    assert outcomes.count("220") >= 1
    assert set(outcomes) <= {"220", "rank 0: ended by SIGKILL"}
    until(lambda: pair.health() == 200, LIMIT_S)
    assert sum(pair.metric("triaxial:replica_restarts_total", i) for i in range(2)) == 1
    assert len(set(before) & set(pair.ranks)) == 1  # the other one did not notice


def test_a_stopped_rank_counts_as_dead(pair: Server) -> None:
    before = pair.ranks
    before[0].send_signal(signal.SIGSTOP)
    until(lambda: pair.health() == 503, 15)
    assert client(pair.url).completions.create(model="tiny", prompt=PROMPT, max_tokens=3).usage.completion_tokens > 0
    until(lambda: pair.health() == 200, LIMIT_S)
    assert not before[0].is_running()
    assert "stopped" in pair.said


def test_sigterm_finishes_what_runs_and_refuses_what_comes(pair: Server) -> None:
    answers: list[Any] = []
    running = ask(pair.url, answers, n=4)
    until(lambda: sum(pair.metric("vllm:num_requests_running", i) for i in range(2)) == 4, LIMIT_S)
    pair.process.send_signal(signal.SIGTERM)
    late: list[Any] = []
    ask(pair.url, late).join(LIMIT_S)
    running.join(LIMIT_S)
    assert answers == ["length"]
    assert isinstance(late[0], openai.APIConnectionError) or late[0].status_code == 503
    assert pair.end() == 0


def test_sigterm_while_the_engine_loads_leaves_nothing(folder: Path) -> None:
    loading = subprocess.Popen([*TRIAXIAL, "serve", str(folder), "--port", "0", "--layout", "tp=2"])
    front = psutil.Process(loading.pid)
    until(lambda: len(front.children()) == 2, LIMIT_S)
    ranks = front.children()
    loading.terminate()
    assert loading.wait(LIMIT_S) == 0
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


# What cannot start


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def refused(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([*TRIAXIAL, "serve", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stderr.strip().splitlines()) == 1
    return done.returncode, done.stderr.strip()


def test_a_port_in_use_is_one_sentence(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = refused(str(folder), "--port", str(port))
    assert code == 2
    assert (
        said == f"triaxial: cannot listen on 127.0.0.1:{port} (Address already in use): choose another --host or --port"
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--layout", "tp=3"), "tp=3"),
        (("--api-key", "a", "--api-key-file", "b"), "not both"),
        (("--api-key-file", "nothing-here"), "nothing-here"),
        (("--api-key", "ключ"), "ASCII"),
        (("--max-model-len", "100000"), "256 positions"),
        (("--request-timeout", "-1"), "--request-timeout"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(folder: Path, arguments: tuple[str, ...], word: str) -> None:
    with pytest.raises(BadInput, match=re.escape(word)) as refusal:
        command.main([str(folder), "--port", "0", *arguments], standalone_mode=False)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing"):
        command.main([str(tmp_path / "nothing")], standalone_mode=False)


def test_a_model_that_cannot_be_loaded_tells_the_ranks_own_error(folder: Path, tmp_path: Path) -> None:
    broken = make_model_folder(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    code, said = refused(str(broken), "--port", "0", "--layout", "tp=2")
    assert code in (1, 2)
    assert "model.safetensors" in said
    assert not [child for child in psutil.Process().children(recursive=True) if str(broken) in command_line(child)]
