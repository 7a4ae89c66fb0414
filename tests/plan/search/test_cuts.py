"""Searched layouts are cut into stages as well as any cut does, uneven ones included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from tests.plan.shapes import llama
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import Layout, ScheduleKind
from triaxial.plan.layout_table import layout_table
from triaxial.plan.search.best import search
from triaxial.plan.search.cuts import with_cuts
from triaxial.plan.training.price import estimate, step_seconds
from triaxial.plan.workload import Training


def all_cuts(blocks: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in combinations(range(1, blocks), stages - 1):
        yield tuple(end - first for first, end in pairwise((0, *inner, blocks)))


@pytest.mark.parametrize("mb", [1, 4])
@pytest.mark.parametrize("device", ["A100", "L40S", "H100-SXM"])
@pytest.mark.parametrize(("name", "layers"), [("llama-3.2-1b", 6), ("qwen2.5-7b", 9), ("llama-3.1-70b", 6)])
@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 2)])
def test_no_cut_is_faster_by_one_and_a_half_per_cent(
    schedule: ScheduleKind, vpp: int, name: str, layers: int, device: str, mb: int
) -> None:
    """Against every cut there is. Heads of 0.7 to 5 layers' seconds; a slowest rank that is as fast as can be is not
    all: the embedding's rank also has most to update."""
    model = load_model_spec(name).model_copy(update={"num_layers": layers})
    cluster, work = load_cluster(f"1x4x{device}"), Training(global_batch=32, seq_len=2048)
    layout = Layout(pp=4, vpp=vpp, schedule=schedule, mb=mb)
    chosen = with_cuts(model, cluster, work, layout_table([layout]))
    every = layout_table([replace(layout, cut=cut) for cut in all_cuts(layers + 2, 4 * vpp)])
    fastest = step_seconds(model, cluster, work, every).step.min()
    assert step_seconds(model, cluster, work, chosen).step[0] <= 1.015 * fastest


def test_a_cut_that_flop_would_not_choose_is_written_out() -> None:
    """Attention makes layers of long sequences dearer than their FLOP, and the head less dear beside them."""
    model = load_model_spec("qwen2.5-7b").model_copy(update={"num_layers": 9})
    cluster, work = load_cluster("1x4xH100-SXM"), Training(global_batch=16, seq_len=8192)
    layout = Layout(pp=4, mb=1)
    cut = with_cuts(model, cluster, work, layout_table([layout])).layout(0)
    assert cut.cut == (3, 3, 3, 2)
    assert estimate(model, cluster, work, cut).step_time_s < 0.98 * estimate(model, cluster, work, layout).step_time_s


def test_a_faster_cut_that_does_not_fit_is_none() -> None:
    model = load_model_spec("llama-3.1-70b").model_copy(update={"num_layers": 6})
    cluster, work = load_cluster("1x4xRTX4090"), Training(global_batch=32, seq_len=1024)
    assert with_cuts(model, cluster, work, layout_table([Layout(pp=4, mb=1)])).layout(0).cut == ()


def test_what_a_search_returns_is_priced_with_its_cut() -> None:
    model, cluster, work = llama(layers=7), load_cluster("1x4xRTX4090"), Training(global_batch=16, seq_len=1024)
    for found in search(model, cluster, work, top=20).best:
        again = estimate(model, cluster, work, found.layout)
        assert again.step_time_s == pytest.approx(found.step_time_s, rel=1e-12)
