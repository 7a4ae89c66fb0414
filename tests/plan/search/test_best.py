"""The search is exhaustive and exact, and arrives at the field's rules of thumb by itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.shapes import gpt, llama, mixture
from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.cost.practice import OURS
from triaxial.plan.layout import Layout
from triaxial.plan.layout_table import layout_table
from triaxial.plan.legal import check_training_layout
from triaxial.plan.search.best import search, search_space
from triaxial.plan.search.enumerate import families, members
from triaxial.plan.search.plan import plan_training
from triaxial.plan.search.what_if import scaled, with_gpus
from triaxial.plan.training.price import estimate, fits, memory_of, step_seconds
from triaxial.plan.validation.published import read_points
from triaxial.plan.workload import Training

WORK = Training(global_batch=64, seq_len=2048)
PAIR = load_cluster("2x8xH100-SXM")


@pytest.mark.parametrize("model", [llama(), mixture()], ids=["dense", "experts"])
def test_every_listed_layout_is_legal_and_none_is_listed_twice(model: ModelSpec) -> None:
    table, _ = members(model, WORK, families(model, PAIR, WORK))
    seen = set()
    for row in range(0, len(table), 7):
        layout = table.layout(row)
        check_training_layout(layout, model, PAIR, WORK)
        seen.add(str(layout))
    assert len(seen) == len(range(0, len(table), 7))


def test_no_legal_layout_is_missing() -> None:
    """Against the check, tried on every combination of a coarse grid."""
    model = llama()
    table, _ = members(model, WORK, families(model, PAIR, WORK))
    listed = {(x.tp, x.cp, x.pp, x.dp, x.mb) for x in (table.layout(row) for row in range(len(table)))}
    sizes = [1, 2, 4, 8, 16]
    legal = set()
    for tp, cp, pp in ((tp, cp, pp) for tp in sizes for cp in sizes for pp in sizes if 16 % (tp * cp * pp) == 0):
        for mb in (1, 2, 4, 8, 16, 32, 64):
            layout = Layout(tp=tp, cp=cp, pp=pp, dp=16 // (tp * cp * pp), mb=mb)
            try:
                check_training_layout(layout, model, PAIR, WORK)
                legal.add((tp, cp, pp, layout.dp, mb))
            except BadInput:
                pass
    assert listed == legal


@pytest.mark.parametrize("model", [llama(), mixture(), load_model_spec("llama-3.1-8b")], ids=["small", "experts", "8b"])
def test_pruning_never_loses_the_best(model: ModelSpec) -> None:
    found = search(model, PAIR, WORK, top=3)
    table, _ = members(model, WORK, families(model, PAIR, WORK))
    fitting = table.take(np.flatnonzero(fits(PAIR, memory_of(model, WORK, OURS, table).peak)))
    every = np.unique(step_seconds(model, PAIR, WORK, fitting).step.round(12))
    times = [e.step_time_s for e in found.best]
    assert times[0] == pytest.approx(every[0], rel=1e-9)
    assert set(np.unique(np.round(times, 12))) <= set(every[:3])
    assert len(table) / 2 < found.considered <= len(table)  # rank orders that come to the same count once
    assert found.priced <= len(fitting)


def test_lower_bounds_and_least_memory_are_below_every_member() -> None:
    model = mixture()
    space = search_space(model, PAIR, WORK)
    table, family = members(model, WORK, space.families)
    assert (step_seconds(model, PAIR, WORK, table).step >= space.bounds[family]).all()
    assert (memory_of(model, WORK, OURS, table).peak >= space.least_bytes[family] * (1 - 1e-12)).all()


def test_bounds_rule_out_nearly_all_layouts_of_405b_on_16384_gpus() -> None:
    """`bench/planner.py` times it."""
    model, cluster = load_model_spec("llama-3.1-405b"), load_cluster("2048x8xH100-SXM")
    found = search(model, cluster, Training(global_batch=2048, seq_len=8192))
    assert found.considered > 5_000_000
    assert found.priced < found.considered / 20


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["arithmetic", "memory bandwidth", "memory", "links inside a node", "network"]),
    st.floats(1.0, 4.0),
    st.sampled_from(["1x8xA100", "2x4xH100-SXM", "2x8xL40S"]),
)
def test_more_of_anything_never_makes_the_best_plan_slower(resource: str, factor: float, name: str) -> None:
    cluster, model = load_cluster(name), llama(layers=12)
    before = search(model, cluster, WORK, top=1).best[0].step_time_s
    after = search(model, scaled(cluster, resource, factor), WORK, top=1).best[0].step_time_s  # type: ignore[arg-type]
    assert after <= before * 1.001


@pytest.mark.parametrize("device", ["A100", "H100-SXM", "H200", "B200"])
def test_tensor_parallelism_stays_within_an_nvlink_node(device: str) -> None:
    cluster = load_cluster(f"16x8x{device}")
    best = search(load_model_spec("gpt3-175b"), cluster, Training(global_batch=512, seq_len=2048), top=1).best[0]
    assert 1 < best.layout.tp <= 8
    assert best.layout.order.startswith("tp")


def test_over_pcie_less_tensor_parallelism_wins() -> None:
    model, work = load_model_spec("llama-2-13b"), Training(global_batch=64, seq_len=4096)
    nvlink = search(model, load_cluster("1x8xA100"), work, top=1).best[0]
    pcie = search(model, load_cluster("1x8xA100", intra="pcie4"), work, top=1).best[0]
    assert pcie.layout.tp <= nvlink.layout.tp
    slow, fast = (
        estimate(model, load_cluster("1x8xA100", intra="pcie4"), work, Layout(tp=tp, dp=8 // tp, zero=1, mb=1))
        for tp in (8, 2)
    )
    assert slow.step_time_s > 1.5 * fast.step_time_s


def test_a_model_that_needs_32_gpus_gets_a_node_for_each_stage() -> None:
    """100B parameters on 4 nodes of 8: 18 bytes a parameter leave no room for a second copy."""
    model, work = gpt("100B", 80, 10240, 80), Training(global_batch=64, seq_len=4096)
    plan = plan_training(model, load_cluster("4x8xA100"), work, flips=False)
    best = plan.plans[0].layout
    assert (best.tp, best.pp, best.dp) == (8, 4, 1)
    fsdp = next(rival for rival in plan.why.rivals if rival.kind == "pure data parallelism")
    assert fsdp.estimate is None or fsdp.estimate.step_time_s > plan.plans[0].step_time_s


def test_adding_nodes_adds_data_parallelism() -> None:
    model = load_model_spec("llama-3.1-70b")
    widths = []
    for nodes in (8, 16, 32):
        work = Training(global_batch=16 * nodes, seq_len=8192)
        best = search(model, load_cluster(f"{nodes}x8xH100-SXM"), work, top=1).best[0].layout
        widths.append(best.dp * best.cp)
    assert widths == sorted(widths)
    assert widths[-1] > widths[0]


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "gpus", "batch", "published"),
    [
        (96, 12288, 96, 64, 64, Layout(tp=8, pp=8, vpp=3, schedule="interleaved", sp=True, recompute="selective")),
        (105, 20480, 128, 280, 280, Layout(tp=8, pp=35, vpp=3, schedule="interleaved", sp=True, recompute="selective")),
    ],
    ids=["175B", "530B"],
)
def test_the_best_layout_is_no_slower_than_the_published_one(
    layers: int, hidden: int, heads: int, gpus: int, batch: int, published: Layout
) -> None:
    """Configurations of arXiv 2205.05198, table 3."""
    model, cluster = gpt("megatron", layers, hidden, heads), load_cluster(f"{gpus // 8}x8xA100")
    work = Training(global_batch=batch, seq_len=2048, precision="fp16")
    theirs = estimate(model, cluster, work, published)
    ours = search(model, cluster, work, top=1).best[0]
    assert ours.step_time_s <= theirs.step_time_s
    assert ours.step_time_s > 0.75 * theirs.step_time_s


def test_the_published_best_of_vtrain_is_near_the_best_found() -> None:
    points, _ = read_points(Path(str(resources.files("triaxial.plan.validation") / "published.csv")))
    rows = [point for point in points if point.source == "vtm" and point.model.hidden == 8192]
    measured = min(rows, key=lambda point: point.step_time_s)
    times = {
        point.id: step_seconds(
            point.model, point.cluster, point.training, layout_table(point.layouts), point.practice
        ).step.min()
        for point in rows
    }
    assert times[measured.id] <= 1.1 * min(times.values())


def test_objectives_choose_what_they_say() -> None:
    model, cluster = load_model_spec("llama-3.1-8b"), load_cluster("2x8xH100-SXM", gpu_price_per_hour=2.0)
    work = Training(global_batch=64, seq_len=4096)
    plans = {
        name: plan_training(model, cluster, work, objective=name, within=0.1, tokens=1e12, flips=False)
        for name in ("time", "throughput", "cost", "gpus", "memory")
    }
    fastest = plans["time"].plans[0]
    assert plans["throughput"].plans[0].tokens_per_s_per_gpu >= fastest.tokens_per_s_per_gpu
    assert plans["cost"].whole_run is not None
    assert plans["time"].whole_run is not None
    assert plans["cost"].whole_run["cost"] <= plans["time"].whole_run["cost"]
    assert plans["gpus"].cluster.num_gpus <= plans["throughput"].cluster.num_gpus
    assert plans["memory"].plans[0].memory_gib["peak"] <= fastest.memory_gib["peak"]
    assert plans["memory"].plans[0].step_time_s <= 1.1 * fastest.step_time_s


def test_a_whole_run_is_steps_times_their_time() -> None:
    model = load_model_spec("llama-3.1-8b")
    plan = plan_training(model, PAIR, WORK, tokens=15e12, flips=False)
    steps = 15e12 / WORK.tokens
    assert plan.whole_run is not None
    assert plan.whole_run["days"] == pytest.approx(steps * plan.plans[0].step_time_s / 86_400)
    assert plan.whole_run["gpu_hours"] == pytest.approx(plan.whole_run["days"] * 24 * 16)


def test_a_model_that_fits_nowhere_names_the_smallest_cluster_that_would_do() -> None:
    with pytest.raises(NoAnswer, match=r"fits no layout on 1x8xA100.*smallest cluster that would do is \d+x8x"):
        plan_training(load_model_spec("llama-3.1-405b"), load_cluster("1x8xA100"), WORK)


def test_a_batch_that_no_layout_divides_is_refused() -> None:
    with pytest.raises(NoAnswer, match="choose a batch"):
        search(load_model_spec("llama-3.1-8b"), load_cluster("37x1xH100-SXM"), WORK)


def test_cost_without_a_price_is_bad_input() -> None:
    with pytest.raises(BadInput, match="--gpu-price"):
        plan_training(llama(), PAIR, WORK, objective="cost")


@pytest.mark.parametrize("gpus", [1, 2, 8, 16, 32])
def test_a_resized_cluster_has_that_many_gpus(gpus: int) -> None:
    assert with_gpus(PAIR, gpus).num_gpus == gpus
