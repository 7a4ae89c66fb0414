"""The balanced cut against every cut there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.model.spec import load_model_spec
from triaxial.plan.pipeline.cut import balanced_cut, placed_cut
from triaxial.plan.pipeline.generators import stage_placement
from triaxial.plan.pipeline.stages import stage_cut


def all_cuts(blocks: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in combinations(range(1, blocks), stages - 1):
        yield tuple(end - first for first, end in pairwise((0, *inner, blocks)))


def sums(values: Sequence[float], cut: Sequence[int]) -> list[float]:
    ends = [sum(cut[: stage + 1]) for stage in range(len(cut))]
    return [sum(values[end - size : end]) for size, end in zip(cut, ends)]


def even(costs: Sequence[float], cut: Sequence[int]) -> tuple[float, float]:
    return max(sums(costs, cut)), sum(part**2 for part in sums(costs, cut))


blocks_and_stages = st.lists(st.integers(0, 20), min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


@settings(deadline=None)
@given(blocks_and_stages)
def test_no_cut_has_a_faster_slowest_stage_or_a_more_even_rest(problem: tuple[list[int], int]) -> None:
    costs, stages = problem
    cut = balanced_cut(costs, stages)
    assert (len(cut), sum(cut), min(cut) >= 1) == (stages, len(costs), True)
    assert even(costs, cut) == min(even(costs, other) for other in all_cuts(len(costs), stages))


@settings(deadline=None)
@given(blocks_and_stages, st.data())
def test_the_best_of_the_cuts_that_fit(problem: tuple[list[int], int], data: st.DataObject) -> None:
    costs, stages = problem
    rows = st.lists(st.integers(1, 9), min_size=len(costs), max_size=len(costs))
    memory = data.draw(st.lists(rows, min_size=stages, max_size=stages))
    limit = data.draw(st.integers(1, 30))
    fitting = [
        cut
        for cut in all_cuts(len(costs), stages)
        if all(sums(row, cut)[stage] <= limit for stage, row in enumerate(memory))
    ]
    if fitting:
        assert even(costs, balanced_cut(costs, stages, memory, limit)) == min(even(costs, cut) for cut in fitting)
    else:
        with pytest.raises(BadInput, match=f"keeps each within {limit} bytes"):
            balanced_cut(costs, stages, memory, limit)


def test_equal_blocks_are_cut_evenly_with_the_larger_stages_last() -> None:
    assert balanced_cut([1.0] * 8, 4) == (2, 2, 2, 2)
    assert balanced_cut([1.0] * 10, 4) == (2, 2, 3, 3)
    assert balanced_cut([0.1] * 7, 3) == (2, 2, 3), "rounding does not tip the balance"


def test_embedding_and_head_count() -> None:
    """Eight layers, a cheap embedding and a head as dear as two and a half layers."""
    assert balanced_cut([0.1, *[1.0] * 8, 2.5], 4) == (3, 3, 3, 1)


def test_one_memory_row_holds_for_every_stage() -> None:
    assert balanced_cut([4.0, 1.0, 1.0, 1.0, 1.0], 2) == (1, 4)
    assert balanced_cut([4.0, 1.0, 1.0, 1.0, 1.0], 2, memory=[10] * 5, memory_limit=30) == (2, 3)


def test_a_block_per_stage_and_all_in_one() -> None:
    assert balanced_cut([3.0, 1.0, 2.0], 3) == (1, 1, 1)
    assert balanced_cut([3.0, 1.0, 2.0], 1) == (3,)


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(BadInput, match="cannot cut 3 blocks into 4 stages: use 1 to 3 stages"):
        balanced_cut([1.0] * 3, 4)
    with pytest.raises(BadInput, match="cannot cut 3 blocks into 0 stages"):
        balanced_cut([1.0] * 3, 0)
    with pytest.raises(BadInput, match="block 1 has a negative cost of -2"):
        balanced_cut([1.0, -2.0], 1)


@given(
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 40),
    st.sampled_from([(0, 1), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 2, 1, 0), (0, 1, 0, 1, 0, 1), (0, 1, 1), (0, 0)]),
)
@settings(max_examples=300, deadline=None)
def test_no_cut_has_a_faster_slowest_rank(
    num_layers: int, embedding: int, head: int, placement: tuple[int, ...]
) -> None:
    costs = [embedding / 10, *(1.0,) * num_layers, head / 10]
    if len(placement) > len(costs):
        with pytest.raises(BadInput, match="stages"):
            placed_cut(num_layers, costs[0], costs[-1], placement)
        return

    def slowest_rank(cut: tuple[int, ...]) -> float:
        loads = [0.0] * len(placement)
        for rank, load in zip(placement, sums(costs, cut)):
            loads[rank] += load
        return max(loads)

    cut = placed_cut(num_layers, costs[0], costs[-1], placement)
    assert sum(cut) == len(costs)
    assert min(cut) >= 1
    assert slowest_rank(cut) <= min(map(slowest_rank, all_cuts(len(costs), len(placement)))) + 1e-9


def test_a_v_shares_out_layers_by_rank_not_by_stage() -> None:
    """Six layers and a light head: stages of at most 2 leave 2.6 beside 4 on the ranks, where 3.6 beside 3 can be."""
    assert balanced_cut([0.0, *(1.0,) * 6, 0.6], 4) == (2, 2, 2, 2)
    cut = placed_cut(6, 0.0, 0.6, (0, 1, 1, 0))
    assert cut[1] + cut[2] == 3
    assert (cut[0] - 1) + (cut[3] - 1) == 3


def test_a_model_is_cut_to_suit_where_its_stages_are() -> None:
    """Llama 3.1 8B: a head of 2.3 layers' work beside 32 layers. On a V it shares its rank with the embedding."""
    model = load_model_spec("llama-3.1-8b")
    assert stage_cut(model, 2048, (0, 1)) == (18, 16)
    assert stage_cut(model, 2048, (0, 1, 2, 3)) == (9, 9, 9, 7)
    first, second, third, last = stage_cut(model, 2048, stage_placement("zb-v", 2, 2))
    assert (second + third, (first - 1) + (last - 1)) == (17, 15)


def test_one_stage_a_rank_is_cut_as_ever() -> None:
    assert placed_cut(8, 0.0, 2.0, (0, 1)) == balanced_cut([0.0, *(1.0,) * 8, 2.0], 2)
