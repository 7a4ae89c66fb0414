"""Choosing tokens: against plain references, and the same whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from triaxial.serve.request import Request, Sampling
from triaxial.serve.sampling import Sampler, exponentials, least_kept
from triaxial.serve.wire import Entry, SamplerState, Step, StepArrays, decode_step, encode_step

VOCAB, SLOTS = 2000, 8
CPU = torch.device("cpu")


def sampler(*sampled: Sampling, prompt: tuple[int, ...] = (1, 2), seeds: tuple[int, ...] = ()) -> Sampler:
    """One that knows a sequence in each slot from 0 on."""
    made = Sampler(SLOTS, VOCAB, frozenset({3}), CPU)
    for slot, sampling in enumerate(sampled):
        seed = seeds[slot] if seeds else slot
        made.learn(SamplerState.of(slot, Request("", prompt, sampling), seed, prompt))
    return made


def step(*slots: int, position: int = 2) -> StepArrays:
    """Every slot's sequence chooses the token at `position`."""
    entries = tuple(Entry(slot, position - 1, [0], True, False, 0, [0]) for slot in slots)
    return decode_step(encode_step(Step(1, entries)))


def logits(rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(made: Sampler, scores: Tensor, asked: StepArrays) -> list[int]:
    chosen: list[int] = made.answer(scores, asked)["tokens"]
    return chosen


@pytest.mark.parametrize("top_k", [0, 1, 40, 1500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.05, 0.9999])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_filters_keep_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    scores = torch.cat([logits(2), logits(1, spread=0.05)])  # the last needs nearly all tokens for top-p
    expected = scores
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)  # type: ignore[arg-type]
    n = len(scores)
    lowest = least_kept(scores, torch.full((n,), top_k), torch.full((n,), top_p), torch.full((n,), min_p))
    differ = (scores >= lowest) != expected.isfinite()
    assert int(differ.sum()) <= (1 if top_p == 0.9999 else 0)  # sums of 2000 numbers in another order


def test_frequencies_are_the_probabilities() -> None:
    sampling = Sampling(temperature=1.3, top_k=5)
    made, row = sampler(sampling), logits(1)
    drawn = [tokens(made, row, step(0, position=position))[0] for position in range(2, 4002)]
    warped = TopKLogitsWarper(5)(None, TemperatureLogitsWarper(1.3)(None, row))  # type: ignore[arg-type]
    expected = warped.softmax(-1)[0].numpy()
    observed = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert set(np.flatnonzero(observed)) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(observed, expected, atol=0.03)  # 3.8 standard deviations of a probability of a half


def test_noise_is_exponential_and_unlike_in_rows_and_columns() -> None:
    keys = torch.stack([torch.arange(300), torch.zeros(300)], 1).to(torch.int32)  # as much alike as keys can be
    noise = exponentials(keys, 300).double()
    uniform = (-noise).exp().numpy()
    assert 0 < noise.min() < 1e-4
    counts, _ = np.histogram(uniform, 100, range=(0, 1))
    assert ((counts - 900) ** 2 / 900).sum() < 149  # chi-squared of 99 degrees, 0.1 %
    assert abs(np.corrcoef(uniform[:-1].ravel(), uniform[1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(uniform[:, :-1].ravel(), uniform[:, 1:].ravel())[0, 1]) < 0.015
    assert len(np.unique(uniform.argmax(1))) > 150  # 300 rows have their largest in 190 different columns, on average
    np.testing.assert_array_equal(exponentials(keys[5:6], 300)[0], exponentials(keys, 300)[5])


def test_a_sequence_draws_the_same_in_every_batch() -> None:
    kinds = (
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(repetition_penalty=1.5, top_k=30),
        Sampling(temperature=2.0, logit_bias={5: 40.0}),
        Sampling(min_p=0.1, presence_penalty=1.0, frequency_penalty=0.5),
    )
    seeds, rows = tuple(range(10, 15)), logits(len(kinds))
    together = tokens(sampler(*kinds, seeds=seeds), rows, step(*range(len(kinds))))
    for i in range(len(kinds)):
        assert tokens(sampler(*kinds, seeds=seeds), rows[i : i + 1], step(i)) == [together[i]]
    order = [3, 0, 4, 1, 2]
    assert tokens(sampler(*kinds, seeds=seeds), rows[order], step(*order)) == [together[i] for i in order]


def test_rounding_of_logits_moves_no_token() -> None:
    """Layouts differ in the last bits; a token changes only where the drawn number lies within them."""
    made, rows = sampler(*[Sampling()] * SLOTS), logits(SLOTS)
    noisy = rows + 1e-5 * logits(SLOTS, seed=1)
    for position in range(2, 52):
        asked = step(*range(SLOTS), position=position)
        assert tokens(made, rows, asked) == tokens(made, noisy, asked)


def test_repetition_penalty_is_that_of_transformers_on_prompt_and_output() -> None:
    penalty, prompt, row = 1.7, (1, 2, 2), logits(1)
    made = sampler(Sampling(temperature=0, repetition_penalty=penalty), prompt=prompt)
    seen = list(prompt)
    for position in range(3, 9):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), row.clone())
        chosen = tokens(made, row, step(0, position=position))
        assert chosen == [int(expected.argmax())]
        seen += chosen
    assert len(set(seen)) > 4  # it did push the likeliest aside


def test_presence_and_frequency_count_the_output_alone() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [10, 11, 12]] = torch.tensor([3.0, 2.6, 2.0])
    made = sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), prompt=(10, 10, 10))
    # 10: 3, then 2.25 with one; 11: 2.6, then 1.85; 10: 2.25, then 2.0, which ties with 12 and comes before it
    assert [tokens(made, row, step(0, position=p))[0] for p in range(3, 7)] == [10, 11, 10, 10]


def test_ends_wait_for_min_tokens() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3], row[0, 9], row[0, 4] = 5.0, 4.0, 3.0
    made = sampler(Sampling(temperature=0, min_tokens=2, stop_token_ids=(9,)))
    assert [tokens(made, row, step(0, position=p))[0] for p in (2, 3, 4)] == [4, 4, 3]
    made = sampler(Sampling(temperature=0, min_tokens=2, ignore_eos=True))
    assert tokens(made, row, step(0)) == [3]


def test_logprobs_are_of_the_raw_logits() -> None:
    row = logits(2)
    made = sampler(Sampling(temperature=0.3, top_k=1, logprobs=3, logit_bias={7: 99.0}), Sampling(temperature=0))
    answer: dict[str, Any] = made.answer(row, step(0, 1))
    assert answer["tokens"][0] == 7
    (token, logprob, top) = answer["logprobs"]["0"]
    expected = row[0].log_softmax(-1)
    assert token == 7
    assert logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert [pair[0] for pair in top] == expected.topk(3).indices.tolist()
    assert set(answer["logprobs"]) == {"0"}


def test_a_resumed_sequence_knows_what_it_had_chosen() -> None:
    sampling = Sampling(temperature=0, frequency_penalty=2.0)
    row = torch.zeros(1, VOCAB)
    row[0, [5, 6]] = torch.tensor([3.0, 2.0])
    made = Sampler(SLOTS, VOCAB, frozenset(), CPU)
    made.learn(SamplerState.of(4, Request("", (1,), sampling), 0, (1, 5)))
    assert tokens(made, row, step(4)) == [6]
