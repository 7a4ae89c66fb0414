"""Layouts that serve for real, beside their simulation."""

import asyncio
from dataclasses import replace

import pytest

from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import load_cluster
from triaxial.measure import bench_serving as module
from triaxial.measure.bench_serving import ServingMeasured, bench_serving, serving_layouts
from triaxial.plan.layout import Layout, parse_layout
from triaxial.plan.serving.workload import Serving
from triaxial.report.bench_serving_table import serving_document
from triaxial.report.bench_table import verdict
from triaxial.serve.generation import Answer
from triaxial.serve.request import Sampling

CLUSTER = load_cluster("1x2xA100-SXM4-80GB")
WORK = Serving(input_len=8, output_len=4, concurrency=2, precision="fp32", kv_precision="fp32")


def silent(layout: Layout) -> None:
    """Tell nobody."""


def test_the_engine_serves_what_is_simulated() -> None:
    found = bench_serving("tiny-byte", CLUSTER, WORK, [parse_layout("tp=2")], rounds=1, tell=silent)
    [row] = found.rows
    assert row.failure == ""
    assert row.comparison is not None
    measured = row.comparison.measured
    assert 0 < measured.tpot_s < measured.ttft_s + 10
    # two sequences at a time can be no faster than their steps
    assert 0 < measured.output_tokens_per_s <= 2.2 / measured.tpot_s
    assert 0.1 < measured.memory_gib < 2
    errors = row.comparison.errors
    assert errors["tpot_s"] == pytest.approx(row.predicted.tpot_s / measured.tpot_s - 1)
    [document] = serving_document(found)["layouts"]
    assert document["measured_ttft_s"] == measured.ttft_s
    assert document["predicted_tpot_s"] == row.predicted.tpot_s
    assert document["relative_errors"] == errors


def test_clients_ask_again_when_answered() -> None:
    """Twenty requests of two clients: never more than two at once, each with its own length."""
    open_now, most, asked = 0, 0, list[tuple[int, int]]()

    class Engine:
        async def answer(self, prompt: tuple[int, ...], sampling: Sampling, stop: object, show: object) -> Answer:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            await asyncio.sleep(0)
            open_now -= 1
            assert sampling.ignore_eos
            asked.append((len(prompt), sampling.max_tokens))
            return Answer(len(prompt), token_ids=[1] * sampling.max_tokens, ttft_s=2.0, tpot_s=0.5)

    prompts = [((1,) * 8, count) for count in range(1, 21)]
    ttft_s, tpot_s, rate = asyncio.run(module._round(Engine(), prompts, 2))  # type: ignore[arg-type]
    assert sorted(asked) == [(8, count) for count in range(1, 21)]
    assert (ttft_s, tpot_s, most) == (2.0, 0.5, 2)
    assert rate > 0


def test_a_failing_layout_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(settings: module.EngineSettings, *_: object) -> ServingMeasured:
        if settings.parsed_layout.pp == 2:
            raise NoAnswer("rank 1: ended by SIGKILL")
        return ServingMeasured(ttft_s=0.1, tpot_s=0.01, output_tokens_per_s=90.0, memory_gib=1.0)

    monkeypatch.setattr(module, "_serve", serve)
    layouts = [parse_layout(text) for text in ("tp=2", "pp=2", "dp=2")]
    found = bench_serving("tiny-byte", CLUSTER, WORK, layouts, rounds=1, tell=silent)
    assert [row.failure for row in found.rows] == ["", "rank 1: ended by SIGKILL", ""]
    assert found.regret == 0
    assert "tp=1,pp=2,dp=1,mb=1: rank 1: ended by SIGKILL" in verdict(found)
    assert serving_document(found)["layouts"][1]["measured_output_tokens_per_s"] is None


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*_: object) -> ServingMeasured:
        raise AssertionError("it was run")

    monkeypatch.setattr(module, "_serve", serve)
    found = bench_serving("llama-3.1-405b", CLUSTER, WORK, [parse_layout("tp=2")], rounds=1, tell=silent)
    # 406 billion parameters of 4 bytes, half of them on each rank
    assert found.rows[0].failure.startswith("does not fit: the fullest rank needs 75")
    assert found.regret is None
    assert found.rank_correlation is None


def test_only_layouts_that_the_engine_decodes() -> None:
    found = serving_layouts("tiny-byte", load_cluster("1x8xA100-SXM4-80GB"), WORK)
    assert {(layout.tp, layout.pp, layout.dp) for layout in found} >= {(8, 1, 1), (2, 2, 2), (1, 1, 8)}
    assert all(layout.world_size == 8 for layout in found)
    assert serving_layouts("tiny-byte", CLUSTER, replace(WORK, input_len=10**6)) == []


def test_requests_that_are_too_long_are_refused_before_anything_starts() -> None:
    with pytest.raises(BadInput, match="positions"):
        bench_serving("tiny-byte", CLUSTER, replace(WORK, input_len=10**6), [Layout(tp=2)], rounds=1, tell=silent)
