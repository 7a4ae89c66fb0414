"""Published serving measurements: read, predicted, summarised; a few of them near enough."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from triaxial import BadInput
from triaxial.plan.serving.constants import SERVING
from triaxial.plan.serving.engine import (
    FASTER_TRANSFORMER,
    TENSORRT_LLM,
    TENSORRT_LLM_0_5,
    TENSORRT_LLM_1_0,
    VLLM,
    VLLM_0_6,
)
from triaxial.plan.validation.kinds import kind_of
from triaxial.plan.validation.serving_accuracy import by_kind, by_source, errors, rank_layouts
from triaxial.plan.validation.serving_left_out import LEFT_OUT
from triaxial.plan.validation.serving_logs import read_log, replay_log
from triaxial.plan.validation.serving_points import read_loop, read_serving, read_static, served_model
from triaxial.plan.validation.serving_predict import ServedPrediction, compare, predict_points

STATIC = """\
id,source,gpu,gpus,model,precision,tp,pp,dp,input_len,output_len,concurrency_or_batch,engine,output_tokens_per_s,tokens_per_s_per_gpu,ttft_ms,tpot_ms,e2e_latency_ms,reported
ft-1,doc,A100-80GB-SXM,1,GPT-20B,fp16,1,1,1,80,200,8,FasterTransformer,,,,,5838,e2e_latency_ms
ft-2,doc,A100-80GB-SXM,8,GPT-20B,fp16,8,1,1,80,200,8,FasterTransformer,,,,,2268,e2e_latency_ms
ft-3,doc,A100-80GB-SXM,24,GPT-530B,fp16,8,3,1,128,8,1,FasterTransformer,,,,,866,e2e_latency_ms;memory
trt-1,doc,H100-80GB-SXM,1,LLaMA 7B,fp8,1,1,1,2048,128,64,TensorRT-LLM 0.5 static batching,2044,,,,,output_tokens_per_s
trt-2,doc,H100-80GB-SXM,1,LLaMA 7B,fp8,1,1,1,2048,,1,TensorRT-LLM 0.5,,,36,,,ttft_ms
queue-1,doc,H100-80GB-SXM,8,LLaMA 70B,fp8,4,1,2,128,128,max load,TensorRT-LLM 0.12,9000,,,,,output_tokens_per_s
odd-1,doc,A100-80GB-SXM,1,Unheard 9B,fp16,1,1,1,80,200,8,vLLM,,,,,5838,e2e_latency_ms
odd-2,doc,A100-80GB-SXM,1,GPT-20B,fp16,1,1,1,80,200,8,vLLM,,,,,,e2e_latency_ms
odd-3,doc,A100-80GB-SXM,1,GPT-20B,fp16,1,1,1,80,200,8,Guesswork 2,,,,,5,e2e_latency_ms
"""
BATCHES = ["ft-1", "ft-2", "ft-3", "trt-1", "trt-2"]
LOOP = """\
id,gpu,model,engine,engine_version,precision,gemm_quant,tp,pp,concurrency_or_batch,input_len,output_len,ttft_ms,tpot_ms
a-0,h200_sxm,meta-llama/Llama-3.1-70B,vllm,,fp8,fp8,1,1,4,1024,1024,203,21.47
a-1,h200_sxm,meta-llama/Llama-3.1-70B,vllm,,fp8,fp8,2,1,4,1024,1024,121,13.91
a-2,h200_sxm,meta-llama/Llama-3.1-70B,vllm,,fp8,fp8,4,1,4,1024,1024,90.6,9.85
b-0,h100_sxm,meta-llama/Llama-3.1-8B-Instruct,trtllm,1.0.0rc3,,,1,1,16,2048,512,413.18,9.702
b-1,b200_sxm,openai/gpt-oss-120b,trtllm,,fp4,nvfp4,1,1,4,1024,128,100,5
"""


@pytest.fixture
def static(tmp_path: Path) -> Path:
    path = tmp_path / "static.csv"
    path.write_text(STATIC)
    return path


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    path = tmp_path / "loop.csv"
    path.write_text(LOOP)
    return path


class TestReading:
    def test_static_batches(self, static: Path) -> None:
        points, skipped = read_static(static)
        assert [point.id for point in points] == [*BATCHES, "queue-1"]
        assert [row.id for row in skipped] == ["odd-1", "odd-2", "odd-3"]
        assert "Unheard 9B" in skipped[0].reason or "unheard 9b" in skipped[0].reason
        assert skipped[2].reason == "unknown engine 'Guesswork 2'"
        first, third, quantised = points[0], points[2], points[3]
        assert first.engine == FASTER_TRANSFORMER
        assert first.measured == {"e2e_latency_ms": 5838}
        assert (third.cluster.num_gpus, str(third.layout)) == (24, "tp=8,pp=3,dp=1,mb=1")
        assert quantised.engine == TENSORRT_LLM_0_5
        assert (quantised.work.precision, quantised.work.kv_precision, quantised.work.concurrency) == ("fp8", "fp8", 64)
        assert points[4].work.output_len == 1
        assert {point.load for point in points[:5]} == {"batch"}
        queue = points[5]
        assert (queue.load, queue.engine, queue.work.concurrency, queue.layout.dp) == ("queue", TENSORRT_LLM, 1000, 2)

    def test_closed_loops(self, loop: Path) -> None:
        points, skipped = read_loop(loop)
        assert not skipped
        assert [point.engine for point in points] == [VLLM_0_6] * 3 + [TENSORRT_LLM_1_0, TENSORRT_LLM]
        assert points[3].measured == {"ttft_ms": 413.18, "tpot_ms": 9.702}
        assert [point.work.precision for point in points] == ["fp8"] * 3 + ["bf16", "fp4"]
        assert {point.source for point in points[:3]} == {"vllm Llama-3.1-70B"}
        assert read_serving(loop)[0] == points

    def test_models_by_any_of_their_names(self) -> None:
        falcon = served_model("Falcon 180B")
        assert (falcon.num_heads, falcon.num_kv_heads, falcon.head_dim, falcon.gated_mlp) == (232, 8, 64, False)
        mixture = served_model("openai/gpt-oss-120b")
        assert mixture.experts is not None
        assert (mixture.experts.count, mixture.experts.per_token) == (128, 4)
        assert (mixture.sliding_window, mixture.first_windowed_layer) == (128, 18)
        assert served_model("meta-llama/Llama-3.1-8B-Instruct") == served_model("Llama 3.1 8B")
        assert served_model("Qwen/Qwen2.5-7B").name == "qwen2.5-7b"  # a preset

    def test_files_of_different_kinds_do_not_mix(self, static: Path, loop: Path, tmp_path: Path) -> None:
        training = tmp_path / "training.csv"
        training.write_text("id,gpu,step_time_s\n")
        assert kind_of([static, loop]) == "serving points"
        assert kind_of([]) == kind_of([training]) == "training steps"
        with pytest.raises(BadInput, match="one kind of measurement at a time"):
            kind_of([static, training])
        with pytest.raises(BadInput, match="cannot read"):
            kind_of([tmp_path / "none.csv"])

    def test_a_table_without_the_columns_is_refused(self, static: Path) -> None:
        with pytest.raises(BadInput, match="lacks engine_version"):
            read_loop(static)


class TestPrediction:
    def test_published_batches_are_met(self, static: Path) -> None:
        found = predict_points(read_static(static)[0][:5])
        assert [round(p.measured) for p in found] == [5838, 2268, 866, 2044, 36]
        assert max(abs(p.error) for p in found) < 0.2

    def test_published_loops_are_met(self, loop: Path) -> None:
        found = predict_points([point for point in read_loop(loop)[0] if not point.model.experts])
        assert max(abs(p.error) for p in found if p.metric == "tpot_ms") < 0.15
        assert max(abs(p.error) for p in found if p.metric == "ttft_ms") < 0.35

    def test_a_queue_keeps_the_largest_batches_busy(self, static: Path) -> None:
        point = read_static(static)[0][5]
        (queued,) = predict_points([point])
        (clients,) = predict_points([replace(point, load="loop", work=replace(point.work, concurrency=32))])
        assert queued.predicted > 3 * clients.predicted

    def test_a_point_that_does_not_fit_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "loop.csv"
        path.write_text(LOOP.splitlines()[0] + "\nx-0,h100_sxm,meta-llama/Llama-3.1-70B,vllm,,,,1,1,4,1024,1024,1,1\n")
        with pytest.raises(BadInput, match=r"x-0: meta-llama/Llama-3.1-70B does not fit"):
            predict_points(read_loop(path)[0])

    def test_three_ways_keep_the_order_of_the_rows(self, static: Path) -> None:
        found = compare(read_static(static)[0])
        ids = [[p.point.id for p in way] for way in (found.in_sample, found.left_out, found.baseline)]
        assert ids[0] == ids[1] == ids[2] == [*BATCHES[:3], "queue-1", *BATCHES[3:]]
        assert errors(found.in_sample).median < 0.5 * errors(found.baseline).median
        assert found.left_out[0].predicted != found.in_sample[0].predicted

    def test_constants_left_out_exist_for_every_fitted_source(self) -> None:
        assert set(LEFT_OUT) >= {"ft", "trt05", "trt061", "trt09", "vllm Llama-3.1-70B", "trtllm Llama-3.1-70B"}
        for values in LEFT_OUT.values():
            assert SERVING.with_values(values).values() == {**SERVING.values(), **values}


class TestSummary:
    def predictions(self, loop: Path, factors: tuple[float, ...]) -> list[ServedPrediction]:
        points = read_loop(loop)[0][:3]
        return [
            ServedPrediction(point, "tpot_ms", point.measured["tpot_ms"] * factor)
            for point, factor in zip(points, factors)
        ]

    def test_errors_of_a_source(self, loop: Path) -> None:
        found = errors(self.predictions(loop, (1.1, 0.8, 1.3)))
        assert (found.count, found.median, found.bias) == (3, pytest.approx(0.2), pytest.approx(0.1))
        assert found.mape == pytest.approx(0.2)

    def test_a_right_order_has_no_regret(self, loop: Path) -> None:
        found = rank_layouts(self.predictions(loop, (1.2, 0.9, 1.1)), per_gpu=False)
        assert found is not None
        assert (found.jobs, found.tau, found.regret_mean, found.best_picked) == (1, 1.0, 0.0, 1.0)

    def test_a_wrong_pick_regrets_what_was_measured(self, loop: Path) -> None:
        # predicted 2.1, 14, 9.9 ms: tp=1 is picked, tp=4 is best; one of three pairs is in order
        found = rank_layouts(self.predictions(loop, (0.1, 1.0, 1.0)), per_gpu=False)
        assert found is not None
        assert found.tau == pytest.approx(-1 / 3)
        assert found.regret_worst == pytest.approx(21.47 / 9.85 - 1)

    def test_cost_ranks_by_seconds_times_gpus(self, loop: Path) -> None:
        found = rank_layouts(self.predictions(loop, (1.0, 1.0, 0.1)), per_gpu=True)
        assert found is not None
        assert found.regret_worst == pytest.approx(4 * 9.85 / 21.47 - 1)  # tp=1 is cheapest

    def test_work_in_one_layout_ranks_nothing(self, loop: Path) -> None:
        assert rank_layouts(self.predictions(loop, (1.0,)), per_gpu=False) is None

    def test_kinds_keep_mixtures_of_experts_apart(self, loop: Path) -> None:
        points = read_loop(loop)[0]
        made = [ServedPrediction(point, metric, 1.0) for point in points for metric in point.measured]
        assert {kind: len(group) for kind, group in by_kind(made).items()} == {
            "TPOT": 4,
            "TPOT, experts": 1,
            "TTFT": 4,
            "TTFT, experts": 1,
        }
        assert list(by_source(made))[-1] == ("vllm Llama-3.1-70B", "TTFT")


class TestLogs:
    def write(self, folder: Path, count: int = 40) -> Path:
        path = folder / "RTXPRO6000-Llama-3.1-8B.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["request", "arrival_s", "input_tokens", "output_tokens", "ttft_ms", "e2e_ms", "tpot_ms"])
            rows.writerows([f"r{n}", n * 0.5, 600 + n, 100, 60, 60 + 99 * 12, 12] for n in reversed(range(count)))
        settings = {"model": "meta-llama/Llama-3.1-8B", "tensor_parallel_size": 1}
        settings |= {"max_num_seqs": 64, "max_num_batched_tokens": 2048}  # type: ignore[dict-item]
        path.with_suffix(".json").write_text(json.dumps({"vllm_version": "0.19.0", "engine_kwargs": settings}))
        return path

    def test_is_replayed_in_the_order_of_arrival(self, tmp_path: Path) -> None:
        log = read_log(self.write(tmp_path))
        assert kind_of([tmp_path / "RTXPRO6000-Llama-3.1-8B.csv"]) == "server logs"
        assert np.all(np.diff(log.traffic.arrival_s) == 0.5)
        assert (log.work.max_batch, log.work.chunk_tokens, log.cluster.device.name) == (64, 2048, "RTX-PRO-6000-Server")
        assert log.engine == VLLM
        first, each, whole = replay_log(log)
        assert (first.metric, each.metric, whole.metric) == ("ttft_ms", "tpot_ms", "e2e_ms")
        assert each.measured_mean == 12
        assert 10 < each.predicted_mean < 16  # 16 GB of weights at 1.6 TB/s, and the rest
        assert whole.predicted_mean == pytest.approx(first.predicted_mean + 99 * each.predicted_mean)
        assert each.error == each.predicted_mean / 12 - 1

    def test_needs_its_settings(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        path.with_suffix(".json").unlink()
        with pytest.raises(BadInput, match=r"with its settings in RTXPRO6000-Llama-3.1-8B.json"):
            read_log(path)
