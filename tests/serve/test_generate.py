"""`triaxial generate` as a user runs it: one command, its output, its exit code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.command import TRIAXIAL
from tests.serve.models import Reference

PROMPT = (5, 17, 9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference("llama", tmp_path_factory.mktemp("llama"))


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*TRIAXIAL, "generate", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240, check=False)


def test_json_tells_tokens_logprobs_and_timings(llama: Reference) -> None:
    done = run(
        str(llama.folder), "--prompt-ids", "5,17,9", "--max-tokens", "9", "--temperature", "0", "--precision", "fp32",
        "--layout", "tp=2,pp=2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    expected, logprobs = llama.greedy(PROMPT, 9)
    assert answer["token_ids"] == expected
    assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    assert (answer["finish_reason"], answer["prompt_tokens"]) == ("length", 3)
    assert answer["text"].split() == [str(token) for token in expected]
    assert answer["timings"]["ttft_s"] > 0
    assert answer["timings"]["tpot_s"] > 0
    assert "KV cache: " in done.stderr


def test_a_file_is_answered_in_its_order_by_all_replicas(llama: Reference, tmp_path: Path) -> None:
    prompts = [PROMPT, (1,), (2,) * 40, (3, 4)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt_ids": prompt}) for prompt in prompts))
    shared = ("--prompts", str(file), "--max-tokens", "5", "--temperature", "0", "--precision", "fp32")
    done = run(str(llama.folder), *shared, "--layout", "dp=2")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["token_ids"] for answer in answers] == [llama.greedy(prompt, 5)[0] for prompt in prompts]


def test_text_is_read_from_standard_input_and_streamed(tmp_path: Path) -> None:
    """tiny-byte has random weights here, so its text is noise, but the seed fixes which."""
    texts = [run("tiny-byte", "--max-tokens", "12", "--seed", "3", stdin="héllo\n") for _ in range(2)]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout == texts[1].stdout
    assert len(texts[0].stdout.strip()) > 0
    given = json.loads(run("tiny-byte", "--max-tokens", "12", "--seed", "3", "--prompt", "héllo", "--json").stdout)
    assert given["prompt_tokens"] == 6
    assert given["text"] + "\n" == texts[0].stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny-byte", "--prompt", "a", "--prompt-ids", "1"), "give one of --prompt, --prompt-ids and --prompts"),
        (("tiny-byte", "--prompt-ids", "1,x"), "is not whole numbers with commas between"),
        (("tiny-byte", "--prompt-ids", "256"), "must be 0 to 255"),
        (("tiny-byte", "--prompt", ""), "the prompt is empty"),
        (("llama-3.1-8b", "--prompt", "a"), "no tokenizer.json: give token ids with --prompt-ids"),
        (("tiny-byte", "--prompt", "a", "--layout", "tp=3"), "valid: 1, 2, 4, 8"),
        (("tiny-byte", "--prompts", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("no-such-model", "--prompt", "a"), "no model 'no-such-model'"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert "KV cache" not in done.stderr


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n["b"]\n')
    done = run("tiny-byte", "--prompts", str(file))
    assert done.returncode == 2
    assert "prompts.jsonl, line 2 is not" in done.stderr
