"""Explanations say what the figures say, and flips are where the search says they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.shapes import llama
from triaxial import BadInput
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.search.best import search, search_space
from triaxial.plan.search.explain import explain, resource_sensitivity, why_not
from triaxial.plan.search.flips import PRECISION, Flip, flip_points, mixture
from triaxial.plan.search.what_if import scaled
from triaxial.plan.workload import Training

PAIR = load_cluster("2x8xH100-SXM")
MODEL = load_model_spec("llama-3.1-8b")
WORK = Training(global_batch=64, seq_len=4096)
BEST = search(MODEL, PAIR, WORK, top=1).best[0]


def test_the_winner_is_set_against_the_best_of_every_other_kind() -> None:
    why = explain(MODEL, PAIR, WORK, BEST, search_space(MODEL, PAIR, WORK), flips=False)
    kinds = {rival.kind for rival in why.rivals}
    assert "the next best mixture" in kinds
    for rival in why.rivals:
        if rival.estimate:
            assert rival.estimate.step_time_s >= BEST.step_time_s
            assert mixture(rival.estimate.layout) != mixture(BEST.layout) or rival.kind != "the next best mixture"
        else:
            assert rival.reason
    assert str(BEST.layout) in why.sentences[0]
    assert set(why.to_dict()) == {"sentences", "rivals", "sensitivity", "flip_points"}


def test_what_binds_a_large_dense_model_is_arithmetic() -> None:
    sensitivity = resource_sensitivity(MODEL, PAIR, WORK, BEST)
    assert max(sensitivity, key=lambda resource: sensitivity[resource]) == "arithmetic"
    assert 0 < sum(sensitivity.values()) <= 1.05


SMALL, FEW = llama(layers=16, hidden=2048), load_cluster("2x4xA100")
LITTLE = Training(global_batch=32, seq_len=2048)


@pytest.fixture(scope="module")
def best() -> Layout:
    return search(SMALL, FEW, LITTLE, top=1).best[0].layout


@pytest.fixture(scope="module")
def flips(best: Layout) -> list[Flip]:
    return flip_points(SMALL, FEW, LITTLE, best)


@pytest.mark.timeout(120)
def test_a_flip_is_where_another_mixture_wins_and_not_before(best: Layout, flips: list[Flip]) -> None:
    assert {flip.what for flip in flips} >= {"GPU memory", "network per NIC", "sequence length", "global batch", "GPUs"}
    for flip in flips:
        assert flip.what in flip.sentence()
        if flip.what == "network per NIC" and flip.at is not None:
            beyond = flip.at / flip.now
            before = beyond / PRECISION if flip.upward else beyond * PRECISION
            there, here = (
                search(SMALL, scaled(FEW, "network", factor), LITTLE, top=1).best[0].layout
                for factor in (beyond, before)
            )
            assert mixture(there) != mixture(best)
            assert mixture(here) == mixture(best)


@pytest.mark.timeout(120)
def test_a_count_flips_at_the_next_value_that_the_winner_divides(best: Layout, flips: list[Flip]) -> None:
    lengths = [flip for flip in flips if flip.what == "sequence length" and flip.at]
    assert lengths
    for flip in lengths:
        length = int(flip.at or 0)
        there = search(SMALL, FEW, replace(LITTLE, seq_len=length), top=1).best[0].layout
        assert mixture(there) != mixture(best)
        step = 2 * best.cp * best.tp
        nearer = length / PRECISION if flip.upward else length * PRECISION
        before = int(nearer / step) * step if flip.upward else -int(-nearer // step) * step
        if before not in (length, 2048):
            here = search(SMALL, FEW, replace(LITTLE, seq_len=before), top=1).best[0].layout
            assert mixture(here) == mixture(best)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp=3", "16 GPUs"),
        ("tp=16", "takes +"),
        ("tp=1,pp=1,mb=4,zero=0,recompute=none,sp=0", "GiB of 80, most of them"),
        ("pp=2,vpp=2,schedule=interleaved,mb=8,dp=8", "micro-batches"),
        ("dp=8,zero=3", "has 16 GPUs"),
        ("tp=2,pp=4", "Not tp=2,pp=4,dp=2,mb=2,zero=2: it takes +"),
    ],
)
def test_why_not_gives_the_reason(text: str, says: str) -> None:
    assert says in why_not(text, BEST, MODEL, PAIR, WORK)


def test_why_not_of_nonsense_is_bad_input() -> None:
    with pytest.raises(BadInput, match="not KEY=VALUE"):
        why_not("fast", BEST, MODEL, PAIR, WORK)
    with pytest.raises(BadInput):
        scaled(PAIR, "memory", 1.0).device.peak("int4")


def test_what_why_not_does_not_name_gives_way() -> None:
    """The winner's pipeline to a wider data axis, and its virtual stages to another pipeline."""
    winner = replace(BEST, layout=Layout(pp=2, dp=8, vpp=9, mb=1, schedule="interleaved", zero=1))
    assert why_not("dp=16", winner, MODEL, PAIR, WORK).startswith("Not tp=1,pp=1,dp=16,mb=1,zero=1:")
    assert why_not("pp=4", winner, MODEL, PAIR, WORK).startswith("Not tp=1,pp=4,dp=4,mb=1,zero=1:")
    assert "vpp=3" in why_not("vpp=3", winner, MODEL, PAIR, WORK)
