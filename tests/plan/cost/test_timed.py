"""Predictions from a probe's points: exact on them, sensible between and beyond."""

import numpy as np
import pytest

from triaxial import BadInput
from triaxial.cluster.hardware import Device, Tier
from triaxial.cluster.spec import Cluster, load_cluster, to_toml
from triaxial.cluster.timings import AttentionTiming, CollectiveTimings, DeviceTimings, GemmTiming, PassTiming
from triaxial.model.spec import load_model_spec
from triaxial.plan.cost.collectives import collective_seconds, group_of
from triaxial.plan.cost.compute import attention_seconds, gemm_seconds
from triaxial.plan.cost.operators import Block, Pass
from triaxial.plan.cost.pricing import price_block
from triaxial.plan.cost.timed import timed_pass_seconds
from triaxial.plan.layout import parse_layout
from triaxial.plan.search.what_if import scaled
from triaxial.plan.training.constants import TRAINING
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training

RATE = 1e9
"""Multiplications per second of every product and attention."""
GEMMS = tuple(
    GemmTiming(m=m, n=n, k=k, seconds=m * n * k / RATE) for m in (1, 64, 1024) for n in (64, 512) for k in (64, 512)
)
ATTENTION = AttentionTiming(
    sequences=2, heads=4, kv_heads=2, length=128, head_dim=64, forward_s=2 * 4 * 128 * 128 * 64 / RATE, backward_s=0.02
)
CURVE = CollectiveTimings(
    kind="all_reduce", members=(2,), sharing=(1.0,), bytes=(1024, 4096, 16384), seconds=(1e-4, 2e-4, 8e-4)
)


def machine(ranks_per_processor: float = 1.0) -> Cluster:
    timings = DeviceTimings(
        gemm={"fp32": GEMMS},
        attention={"fp32": (ATTENTION,)},
        forward_passes={"fp32": PassTiming(launch_s=1e-5, bytes_per_s=1e10)},
        backward_passes={"fp32": PassTiming(launch_s=2e-5, bytes_per_s=4e10)},
        step_s=0.001,
        reserve_bytes=2.0**28,
        ranks_per_processor=ranks_per_processor,
    )
    device = Device(
        name="a CPU",
        generation="cpu",
        peak_flop_per_s={"fp32": 2 * RATE},
        memory_bytes=2.0**33,
        memory_bandwidth_bytes_per_s=1e10,
        sm_count=1,
        memory_efficiency=1.0,
        gemm_efficiency=1.0,
        launch_s=1e-6,
        timings=timings,
    )
    tier = Tier(name="node", ranks=2, link="memory", bandwidth_bytes_per_s=1e9, latency_s=1e-5, efficiency=1.0)
    return Cluster(name="probed", gpus_per_node=2, device=device, tiers=(tier,), timings=(CURVE,))


def test_products_run_at_the_measured_rate() -> None:
    m, n, k = np.array([1, 64, 100, 4096]), np.array([64, 512, 200, 512]), np.array([64, 512, 300, 64])
    assert gemm_seconds(machine().device, m, n, k, "fp32", batch=3) == pytest.approx(3 * m * n * k / RATE)


def test_a_rate_between_two_lies_between_them() -> None:
    slow = GemmTiming(m=64, n=64, k=64, seconds=64**3 / RATE * 4)
    fast = GemmTiming(m=256, n=64, k=64, seconds=256 * 64 * 64 / RATE)
    timings = machine().device.timings.model_copy(update={"gemm": {"fp32": (slow, fast)}})
    device = machine().device.model_copy(update={"timings": timings})
    rate = 128 * 64 * 64 / float(gemm_seconds(device, 128, 64, 64, "fp32"))
    assert rate == pytest.approx(RATE / 2)  # half-way in doublings: the geometric mean of RATE and RATE / 4


def test_attention_runs_at_the_measured_rate() -> None:
    sizes = {"batch": 1, "heads": 8, "kv_heads": 4, "queries": 256, "keys": 256, "head_dim": 64, "precision": "fp32"}
    flop = 8 * 256 * 256 * 64
    assert float(attention_seconds(machine().device, **sizes)) == pytest.approx(flop / RATE)
    backward = 2 * 4 * 128 * 128 * 64 / 0.02
    assert float(attention_seconds(machine().device, **sizes, backward=True)) == pytest.approx(flop / backward)


@pytest.mark.parametrize(
    ("bytes", "seconds"),
    [(100, 1e-4), (1024, 1e-4), (2048, 4e-4 / 3), (16384, 8e-4), (65536, 32e-4)],
)
def test_collectives_follow_the_measured_curve(bytes: int, seconds: float) -> None:
    cluster = machine()
    group = group_of(cluster, {"tp": 2}, "tp")
    assert float(collective_seconds(cluster, "all_reduce", bytes, group)) == pytest.approx(seconds)


def test_a_kind_that_was_not_measured_follows_the_tier() -> None:
    cluster = machine()
    seconds = float(collective_seconds(cluster, "all_gather", 1e8, group_of(cluster, {"tp": 2}, "tp")))
    assert seconds > 0.5e8 / 1e9


def test_precision_that_was_not_probed_is_refused() -> None:
    with pytest.raises(BadInput, match="not probed in bf16, only in fp32"):
        gemm_seconds(machine().device, 1, 1, 1, "bf16")
    with pytest.raises(BadInput, match="not probed in bf16, only in fp32"):
        timed_pass_seconds(machine().device.timings, 1, 1, "bf16")


def test_passes_run_at_the_measured_rate_of_their_direction() -> None:
    timings = machine().device.timings
    assert float(timed_pass_seconds(timings, 1e8, 3, "fp32")) == pytest.approx(3e-5 + 0.01)
    assert float(timed_pass_seconds(timings, 1e8, 3, "fp32", backward=True)) == pytest.approx(6e-5 + 0.0025)
    block = Block(forward=(Pass(1e8, 3),), input_grad=(Pass(1e8, 3),), weight_grad=(Pass(2e8, 1),))
    priced = price_block(machine().device, block, "fp32", lambda axis, kind, size: size, 1)
    phases = (priced.forward, priced.input_grad, priced.weight_grad)
    assert [float(phase.passes[0]) for phase in phases] == pytest.approx([0.01003, 0.00256, 0.00502])


def test_a_processor_moves_messages_itself_inside_its_node_only() -> None:
    """Between nodes the reduction of all but the last of six layers hides behind the backward pass."""
    slow = Tier(name="network", ranks=4, link="ethernet", bandwidth_bytes_per_s=1e9, latency_s=1e-5, efficiency=1.0)
    cluster = machine().model_copy(update={"tiers": (*machine().tiers, slow), "timings": ()})
    work = Training(global_batch=4, seq_len=64, precision="fp32")
    layouts = ("tp=2,dp=2,mb=1,order=dp-tp-cp-pp", "tp=2,dp=2,mb=1")
    inside, between = (estimate(load_model_spec("tiny-byte"), cluster, work, parse_layout(text)) for text in layouts)
    assert inside.hidden_s["dp"] == 0 < inside.time_s["exposed_dp"]
    reduced = between.time_s["exposed_dp"] + (1 - TRAINING.interference) * between.hidden_s["dp"]
    assert between.hidden_s["dp"] == pytest.approx(5 / 6 * reduced)


def test_a_file_gives_the_same_cluster(tmp_path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(to_toml(machine()))
    assert load_cluster(path) == machine()


def test_idle_time_goes_to_ranks_on_the_same_processor() -> None:
    model, layout = load_model_spec("tiny-byte"), parse_layout("tp=1,pp=2,dp=1,mb=1")
    work = Training(global_batch=4, seq_len=64, precision="fp32")
    alone, shared = (estimate(model, machine(ranks), work, layout) for ranks in (1.0, 2.0))
    assert alone.time_s["bubble"] > 0
    assert shared.time_s["bubble"] == 0
    assert shared.time_s["compute"] == alone.time_s["compute"]
    assert alone.memory_gib["reserve"] == pytest.approx(0.25)
    assert sum(alone.time_s.values()) == pytest.approx(alone.step_time_s)


def test_other_links_scale_what_is_not_latency() -> None:
    faster = scaled(machine(), "links inside a node", 4.0)
    assert faster.timings[0].seconds == pytest.approx((1e-4, 1.25e-4, 2.75e-4))
    assert scaled(machine(), "network", 4.0).timings == machine().timings
