"""The balanced cut against every cut there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.model.spec import load_model_spec
from triaxial.plan.pipeline.cut import placed_cut
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


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 40), st.integers(1, 6))
@settings(deadline=None)
def test_no_cut_has_a_faster_slowest_stage_or_a_more_even_rest(
    num_layers: int, embedding: int, head: int, stages: int
) -> None:
    costs = [embedding / 8, *(1.0,) * num_layers, head / 8]  # eighths: sums are exact
    if stages > len(costs):
        return
    cut = placed_cut(num_layers, costs[0], costs[-1], range(stages))
    assert even(costs, cut) == min(even(costs, other) for other in all_cuts(len(costs), stages))


def test_equal_layers_are_cut_evenly_with_the_larger_stages_last() -> None:
    assert placed_cut(8, 0.0, 0.0, range(4)) == (3, 2, 2, 3)
    assert placed_cut(10, 0.0, 0.0, range(4)) == (3, 2, 3, 4)


def test_embedding_and_head_count() -> None:
    """Eight layers, a cheap embedding and a head as dear as two and a half layers."""
    assert placed_cut(8, 0.1, 2.5, range(4)) == (3, 3, 3, 1)


def test_a_block_per_stage_and_all_in_one() -> None:
    assert placed_cut(1, 3.0, 2.0, range(3)) == (1, 1, 1)
    assert placed_cut(1, 3.0, 2.0, range(1)) == (3,)


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(BadInput, match="cannot cut 3 blocks into 4 stages: use 1 to 3 stages"):
        placed_cut(1, 0.0, 1.0, range(4))
    with pytest.raises(BadInput, match="cannot cut 3 blocks into 0 stages"):
        placed_cut(1, 0.0, 1.0, ())


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
    """Six layers and a light head: even stages leave 2.6 beside 4 on the ranks, where 3.6 beside 3 can be."""
    assert placed_cut(6, 0.0, 0.6, range(4)) == (2, 2, 2, 2)
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
