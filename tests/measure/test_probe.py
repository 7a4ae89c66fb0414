"""`triaxial probe` on two ranks, run once as a user runs it, and what the planner makes of the file."""

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from triaxial.cluster.spec import Cluster, load_cluster, to_toml
from triaxial.measure.probe_links import SIZES
from triaxial.measure.probe_products import ATTENTIONS, LINEARS
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.training.price import Estimate, estimate
from triaxial.plan.workload import Training

WORK = Training(global_batch=8, seq_len=64, precision="fp32")


@dataclass(frozen=True)
class Probed:
    folder: Path
    document: dict
    cluster: Cluster


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    folder = tmp_path_factory.mktemp("probe")
    command = [sys.executable, "-m", "triaxial", "probe", "--ranks", "2", "--precision", "fp32", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return Probed(folder, json.loads(done.stdout), load_cluster(folder / "cluster.toml"))


def price(cluster: Cluster, layout: str) -> Estimate:
    return estimate(load_model_spec("tiny-byte"), cluster, WORK, parse_layout(layout))


def test_points_of_the_device(probed: Probed) -> None:
    device = probed.cluster.device
    assert device.timings is not None
    assert set(device.timings.gemm) == {"fp32"}
    shapes = {(p.m, p.n, p.k) for p in device.timings.gemm["fp32"]}
    assert shapes == {
        shape
        for s in LINEARS
        for shape in ((s.tokens, s.out, s.into), (s.tokens, s.into, s.out), (s.into, s.out, s.tokens))
    }
    attentions = {(p.sequences, p.heads, p.length, p.head_dim) for p in device.timings.attention["fp32"]}
    assert attentions == {(s.sequences, s.heads, s.length, s.head_dim) for s in ATTENTIONS}
    # a product of a million multiplications is slower than one of 64
    seconds = {(p.m, p.n, p.k): p.seconds for p in device.timings.gemm["fp32"]}
    assert seconds[1024, 1024, 1024] > 100 * seconds[1, 64, 64] > 0
    for passes in (device.timings.forward_passes, device.timings.backward_passes):
        assert 0 <= passes["fp32"].launch_s < 1e-2
        assert 1e8 < passes["fp32"].bytes_per_s < 1e12
    assert 1e9 < device.peak("fp32") < 1e13
    assert 1e8 < device.memory_bandwidth_bytes_per_s < 1e12
    assert 0 < device.launch_s < 1e-3
    assert 0 < device.timings.token_s < 1e-4
    assert 50e6 < device.timings.reserve_bytes < 2e9


def test_points_of_the_links(probed: Probed) -> None:
    timings = {t.kind: t for t in probed.cluster.timings}
    assert set(timings) == {"all_reduce", "reduce_scatter", "all_gather", "send_recv"}
    for t in timings.values():
        assert t.bytes == SIZES
        assert all(0 < shorter <= longer for shorter, longer in pairwise(t.seconds))
        assert t.members == (2,)
    [fit] = probed.document["fits"]
    assert (fit["tier"], fit["latency_s"] > 0, fit["bytes_per_s"] > 1e6) == ("node", True, True)
    assert 0 <= fit["median_error"] < 1


def test_the_file_says_where_and_when_it_was_made(probed: Probed) -> None:
    device = probed.cluster.device
    assert device.name
    assert f"torch {torch.__version__}" in device.source
    assert "2 ranks on" in device.source
    made = date.fromisoformat(device.source.partition(", ")[2][:10])
    assert (date.today() - made).days in (0, 1)


def test_json_is_the_file(probed: Probed) -> None:
    assert Cluster.model_validate(probed.document["cluster"]) == probed.cluster.model_copy(
        update={"name": probed.document["cluster"]["name"]}
    )
    assert isinstance(probed.document["outliers"], list)


def test_local_reads_it_and_predictions_use_its_points(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(probed.folder)
    local = load_cluster("local")
    assert local == probed.cluster
    slower = tuple(
        t.model_copy(update={"seconds": tuple(3 * s for s in t.seconds)}) if t.kind == "all_reduce" else t
        for t in local.timings
    )
    before, after = (price(cluster, "tp=2,mb=8") for cluster in (local, local.model_copy(update={"timings": slower})))
    assert after.time_s["exposed_tp"] == pytest.approx(3 * before.time_s["exposed_tp"])
    assert after.time_s["compute"] == before.time_s["compute"] > 0
    assert before.time_s["data"] == pytest.approx(8 * 64 * local.device.timings.token_s)


def test_the_file_survives_being_written_again(probed: Probed) -> None:
    assert to_toml(probed.cluster) == (probed.folder / "cluster.toml").read_text()
