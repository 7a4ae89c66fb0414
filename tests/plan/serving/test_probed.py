"""Steps on a device that a probe has measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.plan.serving.test_step import cost
from tests.plan.shapes import llama
from triaxial import BadInput
from triaxial.cluster.hardware import Device, Tier
from triaxial.cluster.spec import Cluster, load_cluster, to_toml
from triaxial.cluster.timings import (
    AttentionTiming,
    DeviceTimings,
    EngineRates,
    EngineTimings,
    GemmTiming,
    PassTiming,
    ProductTiming,
    ServerTimings,
)
from triaxial.plan.layout import Layout
from triaxial.plan.serving.constants import SERVING
from triaxial.plan.serving.cost.probed import product_seconds
from triaxial.plan.serving.cost.step import step_cost
from triaxial.plan.serving.engine import OURS, OURS_CALLED, VLLM_0_6
from triaxial.plan.serving.workload import Serving

SERVER = ServerTimings(request_s=3e-3, step_s=5e-4, sequence_s=5e-5)
FP32 = {"precision": "fp32", "kv_precision": "fp32"}


class TestProbedDevice:
    """A device whose matrix products, attention and passes a probe has timed."""

    def probed(self) -> Cluster:
        rate = 5e10  # multiplications a second
        timings = DeviceTimings(
            gemm={"fp32": tuple(GemmTiming(m=m, n=1024, k=1024, seconds=m * 1024**2 / rate) for m in (1, 64, 512))},
            attention={"fp32": (_attention(64), _attention(512))},
            forward_passes={"fp32": PassTiming(launch_s=1e-5, bytes_per_s=4e9)},
            backward_passes={"fp32": PassTiming(launch_s=1e-5, bytes_per_s=4e9)},
            step_s=0.0,
            reserve_bytes=0.0,
        )
        device = Device(
            name="cpu",
            generation="cpu",
            peak_flop_per_s={"fp32": 2e11},
            memory_bytes=8 * 2**30,
            memory_bandwidth_bytes_per_s=2e10,
            memory_efficiency=0.8,
            sm_count=1,
            launch_s=1e-6,
            timings=timings,
        )
        shared = Tier(name="host", ranks=2, link="memory", bandwidth_bytes_per_s=5e9)
        return Cluster(name="local", gpus_per_node=2, device=device, tiers=(shared,))

    def test_is_priced_by_its_points(self) -> None:
        model = llama()
        priced = cost(model, self.probed(), engine=OURS, **FP32)
        parts = priced.parts(512, 512 * 513 / 2, 0, 0)
        layers = model.num_layers * (model.attention_matrices + model.mlp_matrices(model.ffn))
        attention = model.num_layers * _attention(512).forward_s * model.num_heads / 8  # timed with 8 heads
        assert parts["weights"] + parts["compute"] == pytest.approx(512 * layers / 5e10 + attention, rel=1e-3)
        assert parts["launches"] == 0
        decode = priced.parts(0, 0, 4, 1000)
        assert decode["kv"] == pytest.approx(1000 * 2 * 512 * 4 * 8 / (2e10 * 0.8 * SERVING.kv_gain))

    def test_in_a_precision_that_was_not_probed_is_refused(self) -> None:
        with pytest.raises(BadInput, match="not probed in bf16"):
            cost(llama(), self.probed(), engine=OURS)

    def with_engine(self) -> Cluster:
        rates = EngineRates(
            products=(
                ProductTiming(rows=1, call_s=1e-5, weights_per_s=5e9),
                ProductTiming(rows=8, call_s=1e-5, weights_per_s=4e9),
                ProductTiming(rows=64, call_s=2e-5, weights_per_s=1e9),
            ),
            attention_flop_per_s=1e11,
            kv_bytes_per_s=2e9,
            pass_launch_s=1e-4,
            pass_bytes_per_s=3e9,
        )
        engine = EngineTimings(rates={"fp32": rates}, stage_s=5e-4, step_s=1e-3, sequence_s=2e-4, server=SERVER)
        cluster = self.probed()
        timings = cluster.device.timings
        assert timings is not None
        device = cluster.device.model_copy(update={"timings": timings.model_copy(update={"engine": engine})})
        return cluster.model_copy(update={"device": device})

    def test_our_engine_is_priced_by_what_was_measured_of_it(self) -> None:
        model, cluster = llama(), self.with_engine()
        parts = cost(model, cluster, engine=OURS, **FP32).parts(0, 0, 8, 4000)
        weights = model.num_layers * (model.attention_matrices + model.mlp_matrices(model.ffn))
        weights += model.vocab * model.hidden
        calls = model.num_layers * 4 + 1
        assert parts["weights"] == pytest.approx(weights / 5e9 + calls * 1e-5)
        assert parts["weights"] + parts["compute"] == pytest.approx(weights / 4e9 + calls * 1e-5)
        assert parts["kv"] == pytest.approx(4000 * 2 * 512 * 4 * model.num_layers / 2e9)
        assert parts["host"] == pytest.approx(1e-3 + 8 * 2e-4)
        assert parts["launches"] == pytest.approx(5e-4)
        two = cost(model, cluster, layout=Layout(pp=2), engine=OURS_CALLED, **FP32).parts(0, 0, 8, 4000)
        assert two["launches"] == pytest.approx(2 * 5e-4)
        assert two["host"] == parts["host"]

    @pytest.mark.parametrize(
        ("layout", "crowded"), [(Layout(), False), (Layout(tp=2), True), (Layout(pp=2), True)], ids=str
    )
    def test_server_and_client_take_processors_from_ranks_that_fill_them(self, layout: Layout, crowded: bool) -> None:
        work, client = (
            Serving(input_len=1, output_len=1, **FP32),
            ServerTimings(request_s=2e-3, step_s=1e-4, sequence_s=2e-5),
        )
        called, served, asked = (
            step_cost(llama(), self.with_engine(), layout, work, engine, client=client)
            for engine, client in ((OURS_CALLED, None), (OURS, None), (OURS, client))
        )
        assert [one.request_s for one in (called, served, asked)] == [0.0, 3e-3, pytest.approx(5e-3)]
        decoding, prompts = (0, 0, 8, 4000), (512, 100_000, 7, 4000, 2)
        longer = asked.seconds(*decoding) - called.seconds(*decoding)
        assert longer == pytest.approx(crowded * (6e-4 + 8 * 7e-5))
        longer = asked.seconds(*prompts) - called.seconds(*prompts)
        assert longer == pytest.approx(crowded * (6e-4 + 9 * 7e-5 + 2 * 5e-3))
        assert served.seconds(*decoding) - called.seconds(*decoding) == pytest.approx(crowded * (5e-4 + 8 * 5e-5))

    def test_it_is_read_from_a_cluster_file(self, tmp_path: Path) -> None:
        path = tmp_path / "cluster.toml"
        path.write_text(to_toml(self.with_engine()))
        assert load_cluster(path) == self.with_engine()

    def test_other_engines_are_not(self) -> None:
        own, other = (
            cost(llama(), self.with_engine(), engine=engine, **FP32).parts(0, 0, 8, 4000) for engine in (OURS, VLLM_0_6)
        )
        assert other["host"] == SERVING.hosts["vllm"].step_s + 8 * SERVING.hosts["vllm"].sequence_s
        assert own["host"] != other["host"]

    @pytest.mark.parametrize(("rows", "seconds"), [(1, 0.2), (8, 0.25), (3, 0.2246), (64, 1.0), (128, 2.0)])
    def test_products_between_and_beyond_the_measured_rows(self, rows: int, seconds: float) -> None:
        products = [ProductTiming(rows=m, call_s=0, weights_per_s=r) for m, r in ((1, 5e9), (8, 4e9), (64, 1e9))]
        expected = seconds if rows != 3 else 0.2 * (0.25 / 0.2) ** (np.log2(3) / 3)
        assert product_seconds(products, rows, 1e5, 1e4) == pytest.approx(expected)


def _attention(length: int) -> AttentionTiming:
    seconds = length**2 * 64 * 8 / 1e10
    return AttentionTiming(
        sequences=1, heads=8, kv_heads=8, length=length, head_dim=64, forward_s=seconds, backward_s=2 * seconds
    )
