"""Greedy tokens and their log-probabilities are those of transformers under every layout, in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.serve.driver import Answer, Driver
from tests.serve.models import VOCAB, Reference
from triaxial import BadInput
from triaxial.serve.request import EngineStats, Request, Sampling

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYOUTS = ("tp=1", "tp=2", "tp=4", "pp=2", "tp=2,pp=2")
LENGTHS = (1, 2, 15, 16, 17, 63, 130, 511, 1000)
COUNT = 12
CASES = [(family, layout) for family in FAMILIES for layout in LAYOUTS]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, length)).integers(0, VOCAB, length).tolist())


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {family: Reference(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Iterator[tuple[Reference, Driver]]:
    family, layout = request.param
    driver = Driver(model=str(references[family].folder), layout=layout, chunk_tokens=96, max_batch=6)
    yield references[family], driver
    driver.close()


def assert_greedy(answer: Answer, reference: Reference, tokens: tuple[int, ...], count: int = COUNT) -> None:
    expected, logprobs = reference.greedy(tokens, count)
    assert answer.tokens == expected
    assert answer.finish_reason == "length"
    np.testing.assert_allclose([one.logprob for one in answer.logprobs], logprobs, rtol=0, atol=1e-4)
    assert [one.token for one in answer.logprobs] == expected


def test_answers_are_those_of_transformers_alone_and_together(case: tuple[Reference, Driver]) -> None:
    reference, driver = case
    prompts = [prompt(length) for length in LENGTHS]
    greedy = {"temperature": 0, "max_tokens": COUNT, "logprobs": 0}
    for tokens, answer in zip(prompts, driver.answers([(p, greedy) for p in prompts]), strict=True):
        assert_greedy(answer, reference, tokens)
    assert_greedy(driver.answer(prompts[4], **greedy), reference, prompts[4])
    assert driver.engine.stats().blocks_used == 0


@pytest.fixture(scope="module")
def llama(references: dict[str, Reference]) -> Reference:
    return references["llama"]


@pytest.fixture(scope="module", params=["tp=1", "tp=2,pp=2"])
def small(request: pytest.FixtureRequest, llama: Reference) -> Iterator[Driver]:
    """An engine whose cache holds far less than what it is asked for at once."""
    per_token = 2 * 4 * 4 * 32 * 2 * (1 if request.param == "tp=1" else 0.25)  # k and v, layers, bytes, dim, kv heads
    memory = int(16 * 16 * per_token)
    driver = Driver(
        model=str(llama.folder), layout=request.param, chunk_tokens=32, max_batch=8, kv_memory=memory, max_model_len=200
    )
    assert driver.engine.stats().blocks_total == 16
    yield driver
    driver.close()


def test_preempted_and_resumed_requests_give_the_same_tokens(small: Driver, llama: Reference) -> None:
    prompts = [prompt(length, seed=1) for length in (40, 33, 50, 7, 21, 64)]
    greedy = {"temperature": 0, "max_tokens": 60, "logprobs": 0}
    before = small.engine.stats().preemptions
    for tokens, answer in zip(prompts, small.answers([(p, greedy) for p in prompts]), strict=True):
        assert_greedy(answer, llama, tokens, count=60)
    assert small.engine.stats().preemptions > before
    assert small.engine.stats().blocks_used == 0


def test_a_preempted_request_draws_the_tokens_that_it_would_have_drawn(small: Driver) -> None:
    prompts = [prompt(length, seed=2) for length in (40, 33, 50, 7, 21, 64)]
    drawn = {"temperature": 1.5, "max_tokens": 60, "frequency_penalty": 0.3}
    before = small.engine.stats().preemptions
    together = small.answers([(p, drawn | {"seed": i}) for i, p in enumerate(prompts)])
    assert small.engine.stats().preemptions > before
    alone = [small.answer(p, **drawn, seed=i) for i, p in enumerate(prompts)]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_prompt_logprobs_are_those_of_transformers(small: Driver, llama: Reference) -> None:
    """Chunked, with other requests beside it, and preempted on the way."""
    asked = {"temperature": 0, "max_tokens": 40, "prompt_logprobs": 2}
    prompts = [prompt(length, seed=3) for length in (1, 2, 70, 60, 65)]
    for tokens, answer in zip(prompts, small.answers([(p, asked) for p in prompts]), strict=True):
        scores = llama.scores(tokens)
        assert [one.token for one in answer.prompt_logprobs] == list(tokens[1:])
        for place, one in enumerate(answer.prompt_logprobs):
            assert one.logprob == pytest.approx(float(scores[place, tokens[place + 1]]), abs=1e-4)
            best = scores[place].topk(2)
            assert [token for token, _ in one.top] == best.indices.tolist()
            np.testing.assert_allclose([value for _, value in one.top], best.values, atol=1e-4)


def test_one_seed_gives_the_same_tokens_under_every_layout(
    case: tuple[Reference, Driver], drawn_by_one: dict[str, list[list[int]]]
) -> None:
    reference, driver = case
    asked = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24}
    requests = [(prompt(9 + i, seed=4), asked | {"seed": i, "top_k": 50 * (i % 2)}) for i in range(6)]
    tokens = [answer.tokens for answer in driver.answers(requests)]
    expected = drawn_by_one.setdefault(reference.folder.name, tokens)  # of the first layout, tp=1
    assert tokens == expected
    assert len({tuple(one) for one in tokens}) == 6


@pytest.fixture(scope="module")
def drawn_by_one() -> dict[str, list[list[int]]]:
    return {}


def test_stop_tokens_end_an_answer_and_are_its_last(small: Driver, llama: Reference) -> None:
    tokens = prompt(20, seed=5)
    expected, _ = llama.greedy(tokens, 12)
    end = expected[5]
    first = expected.index(end)
    answer = small.answer(tokens, temperature=0, max_tokens=12, stop_token_ids=(end,))
    assert (answer.tokens, answer.finish_reason) == (expected[: first + 1], "stop")
    later = small.answer(tokens, temperature=0, max_tokens=12, stop_token_ids=(end,), min_tokens=first + 2)
    assert end not in later.tokens[: first + 2]


def test_a_sequence_ends_where_the_model_does(small: Driver) -> None:
    answer = small.answer(prompt(190, seed=6), temperature=0, max_tokens=60)
    assert (len(answer.tokens), answer.finish_reason) == (10, "length")


@pytest.mark.parametrize(
    ("tokens", "sampling", "says"),
    [
        ((), {}, "empty"),
        ((VOCAB,), {}, "must be 0 to 100"),
        ((-1,), {}, "must be 0 to 100"),
        ((1,) * 200, {}, "200 tokens"),
        ((1,), {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ((1,), {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_can_never_be_answered_is_refused(
    small: Driver, tokens: tuple[int, ...], sampling: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        small.answer(tokens, **sampling)


def test_closing_a_request_frees_its_blocks_at_once(small: Driver) -> None:
    async def leave() -> tuple[EngineStats, EngineStats]:
        chunks = small.engine.generate(Request("", prompt(50), Sampling(max_tokens=100, ignore_eos=True)))
        await anext(chunks)
        during = small.engine.stats()
        await chunks.aclose()
        return during, small.engine.stats()

    during, after = small.run(leave())
    assert (during.running, during.blocks_used) == (1, 4)
    assert (after.running, after.waiting, after.blocks_used) == (0, 0, 0)
    assert len(small.answer(prompt(5), max_tokens=3).tokens) == 3


def test_bf16_is_as_near_as_its_rounding(llama: Reference) -> None:
    """Weights of this type are packed in another order on a CPU."""
    tokens = prompt(90, seed=7)
    driver = Driver(model=str(llama.folder), layout="tp=2", precision="bf16", chunk_tokens=64)
    try:
        answer = driver.answer(tokens, temperature=0, max_tokens=4, prompt_logprobs=0)
    finally:
        driver.close()
    scores = llama.scores(tokens)
    exact = [float(scores[place, token]) for place, token in enumerate(tokens[1:])]
    differences = np.abs(np.array([one.logprob for one in answer.prompt_logprobs]) - exact)
    assert 0 < np.median(differences) < 0.03  # bf16 keeps 8 bits
    assert differences.max() < 0.3
