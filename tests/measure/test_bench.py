"""Runs held against predictions: terms, errors, regret, and layouts that fail."""

import json
from pathlib import Path

import pytest

from triaxial import BadInput, Ended, NoAnswer
from triaxial.cluster.spec import load_cluster
from triaxial.cluster.timings import AttentionTiming, DeviceTimings, GemmTiming, PassTiming
from triaxial.measure import bench_training as module
from triaxial.measure.bench_training import bench_training, training_layouts
from triaxial.measure.compare import TERMS, compare_run, read_measured
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.plan.pipeline.schedule import build_schedule
from triaxial.plan.pipeline.simulate import StageCosts, simulate
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training
from triaxial.report.run_comparison import write_comparison
from triaxial.train.config import TrainConfig, make_config

CLUSTER = load_cluster("1x2xA100-SXM4-80GB")
WORK = Training(global_batch=8, seq_len=64, precision="bf16")
STEP_S = {"tp=1,pp=2,dp=1,mb=2": 0.5, "tp=2,pp=1,dp=1,mb=2": 0.4}


def write_run(config: TrainConfig, step_s: float, data_s: float = 0.01) -> None:
    """A run's folder as the trainer leaves it: 1F1B over two stages, forward 1 and backward 2 hundredths of a second."""
    config.out.mkdir(parents=True)
    (config.out / "settings.json").write_text(config.model_dump_json())
    lines = [
        {
            "step": step,
            "loss": 1.0,
            "step_time_s": 9.0 if step < 2 else step_s,
            "peak_memory_bytes": 2**30,
            "bubble_fraction": 0.2,
            "data_s": data_s,
        }
        for step in range(5)
    ]
    (config.out / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4, "eval_loss": 1.0}])
    )
    schedule = build_schedule("1f1b", ranks=2, micro_batches=4)
    timeline = simulate(
        schedule, StageCosts(forward_s=(0.01, 0.01), input_s=(0.01, 0.01), weight_s=(0.01, 0.01))
    ).timeline
    (config.out / "timeline.json").write_text(MeasuredStep(2, schedule, timeline).to_json())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def launch(config: TrainConfig) -> bool:
        seen.append(config.layout)
        if config.layout not in STEP_S:
            raise NoAnswer("rank 1 failed: out of memory")
        write_run(config, STEP_S[config.layout])
        return True

    monkeypatch.setattr(module, "launch", launch)
    return seen


def test_rows_regret_and_correlation(launched: list[str], tmp_path: Path) -> None:
    layouts = [parse_layout(text) for text in (*STEP_S, "tp=1,pp=1,dp=2,mb=4")]
    found = bench_training("tiny-byte", CLUSTER, WORK, layouts, steps=5, out=tmp_path, tell=lambda layout: None)
    assert launched == [str(layout) for layout in layouts]
    assert [row.failure for row in found.rows] == ["", "", "rank 1 failed: out of memory"]
    assert [row.measured.step_time_s for row in found.measured] == [0.5, 0.4]
    predicted = [row.predicted.step_time_s for row in found.measured]
    right = predicted[0] > predicted[1]
    assert found.rank_correlation == pytest.approx(1.0 if right else -1.0)
    assert found.regret == pytest.approx(0.0 if right else 0.25)


def test_terms_add_up_to_the_step(launched: list[str], tmp_path: Path) -> None:
    layout = parse_layout("tp=1,pp=2,dp=1,mb=2")
    found = bench_training("tiny-byte", CLUSTER, WORK, [layout], steps=5, out=tmp_path, tell=lambda layout: None)
    comparison = compare_run(tmp_path / str(layout).replace(",", "-"), CLUSTER)
    assert found.measured == [comparison]
    # 4 x (1 + 2) hundredths busy, one forward and one backward idle, a hundredth for data,
    # the rest of half a second is outside the table
    assert comparison.measured.terms == pytest.approx(
        {"computation": 0.12, "pipeline": 0.03, "reduction and update": 0.34, "data loading": 0.01}
    )
    assert sum(comparison.predicted_terms.values()) == pytest.approx(comparison.predicted.step_time_s)
    assert {part for parts in TERMS.values() for part in parts} == set(comparison.predicted.time_s)
    assert comparison.measured.memory_gib == 1.0
    assert comparison.furthest_term == "reduction and update"


def test_every_legal_cut_once() -> None:
    found = training_layouts(load_model_spec("tiny-byte"), load_cluster("1x8xA100-SXM4-80GB"), WORK)
    cuts = [(layout.tp, layout.pp, layout.dp) for layout in found]
    # 8 kv heads at most 4, 6 layers and two ends fill 8 stages
    assert sorted(cuts) == sorted(
        (tp, pp, 8 // tp // pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if 8 % (tp * pp) == 0
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        compare_run(tmp_path, CLUSTER)
    with pytest.raises(BadInput, match="holds no finished run"):
        read_measured(tmp_path)


def test_far_off_prediction_names_its_term(launched: list[str], tmp_path: Path) -> None:
    layout = parse_layout("tp=1,pp=2,dp=1,mb=2")
    bench_training("tiny-byte", CLUSTER, WORK, [layout], steps=5, out=tmp_path, tell=lambda layout: None)
    run = tmp_path / str(layout).replace(",", "-")
    text = write_comparison(run, "1x2xA100-SXM4-80GB")
    assert text.startswith("a step took 500 ms, predicted ")
    assert "data loading 10 ms (0)" in text
    assert "warning: reduction and update is furthest off: 340 ms, predicted " in text
    document = json.loads((run / "comparison.json").read_text())
    assert document["measured_step_time_s"] == 0.5
    assert document["measured_terms_s"]["computation"] == pytest.approx(0.12)


def test_slow_data_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(make_config({"model": "tiny-byte", "data": ".", "layout": "pp=2,mb=2", "out": run}), 0.5, data_s=0.3)
    text = write_comparison(run, "1x2xA100-SXM4-80GB")
    assert "warning: data loading is furthest off: 300 ms, predicted 0" in text
    assert json.loads((run / "comparison.json").read_text())["measured_terms_s"]["data loading"] == 0.3


def test_reading_is_priced_where_it_was_probed() -> None:
    """Each of two replicas reads half of the tokens."""
    layout, model = parse_layout("dp=2,mb=2"), load_model_spec("tiny-byte")
    timings = DeviceTimings(
        gemm={"bf16": (GemmTiming(m=64, n=64, k=64, seconds=1e-6),)},
        attention={
            "bf16": (
                AttentionTiming(
                    sequences=1, heads=2, kv_heads=1, length=64, head_dim=32, forward_s=1e-6, backward_s=2e-6
                ),
            )
        },
        forward_passes={"bf16": PassTiming(launch_s=1e-6, bytes_per_s=1e9)},
        backward_passes={"bf16": PassTiming(launch_s=1e-6, bytes_per_s=1e9)},
        step_s=0.0,
        token_s=1e-3,
        reserve_bytes=0.0,
    )
    device = CLUSTER.device.model_copy(update={"timings": timings})
    priced = estimate(model, CLUSTER.model_copy(update={"device": device}), WORK, layout)
    assert priced.time_s["data"] == pytest.approx(8 * 64 / 2 * 1e-3)
    assert sum(priced.time_s.values()) == pytest.approx(priced.step_time_s)
    assert estimate(model, CLUSTER, WORK, layout).time_s["data"] == 0


def test_a_signal_ends_the_bench_and_not_a_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []

    def launch(config: TrainConfig) -> bool:
        started.append(config.layout)
        raise Ended("ended by SIGTERM")

    monkeypatch.setattr(module, "launch", launch)
    layouts = [parse_layout(text) for text in STEP_S]
    with pytest.raises(Ended, match="ended by SIGTERM"):
        bench_training("tiny-byte", CLUSTER, WORK, layouts, steps=5, out=tmp_path, tell=lambda layout: None)
    assert len(started) == 1


def test_nothing_runs_if_a_layout_cannot_be_priced(launched: list[str], tmp_path: Path) -> None:
    layouts = [parse_layout(text) for text in ("tp=2,mb=2", "tp=4,mb=2")]
    with pytest.raises(BadInput, match="4"):
        bench_training("tiny-byte", CLUSTER, WORK, layouts, steps=5, out=tmp_path, tell=lambda layout: None)
    assert launched == []


def test_a_cluster_of_another_size_is_no_comparison(launched: list[str], tmp_path: Path) -> None:
    layout = parse_layout("tp=1,pp=2,dp=1,mb=2")
    bench_training("tiny-byte", CLUSTER, WORK, [layout], steps=5, out=tmp_path, tell=lambda layout: None)
    run = tmp_path / str(layout).replace(",", "-")
    assert write_comparison(run, "1x8xA100-SXM4-80GB").startswith("not held against a prediction: ")
    assert not (run / "comparison.json").exists()
