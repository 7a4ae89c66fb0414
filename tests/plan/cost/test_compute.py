"""One device's times: near published measurements, never better than the roofline, and monotone in everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.cluster.catalog import catalog, find_device
from triaxial.cluster.hardware import BYTES_PER_ELEMENT, Device, Precision
from triaxial.plan.cost.compute import (
    attention_seconds,
    gemm_seconds,
    launch_seconds,
    memory_bytes_per_s,
    pass_seconds,
    sustained_flop_per_s,
)
from triaxial.plan.cost.constants import COMPUTE

A100, H100, L40S = (find_device(name) for name in ("A100-80GB-SXM", "H100-SXM", "L40S"))

devices = st.sampled_from(sorted(catalog().devices)).map(find_device)
sizes = st.integers(1, 20_000)
precisions: st.SearchStrategy[Precision] = st.sampled_from(["fp16", "bf16", "fp8"])


def changed(device: Device, **update: Any) -> Device:
    return device.model_copy(update=update)


def attend(device: Device, queries: int, keys: int | None = None, **options: Any) -> float:
    shape = {"batch": 16_384 // queries, "heads": 16, "kv_heads": 16, "head_dim": 128, "precision": "fp16"} | options
    return float(attention_seconds(device, queries=queries, keys=keys or queries, **shape))


class TestMeasured:
    """Rows of ai-dynamo/aiconfigurator's tables (TensorRT-LLM on one GPU): m, n, k, measured microseconds."""

    @pytest.mark.parametrize(
        ("device", "precision", "m", "n", "k", "measured_us"),
        [
            (A100, "bf16", 8192, 8192, 8192, 4188.5),  # gemm-015
            (A100, "bf16", 4096, 1024, 16384, 549.035),  # gemm-094: few tiles
            (A100, "bf16", 1024, 6144, 4096, 206.814),  # gemm-122
            (A100, "bf16", 1, 8192, 8192, 87.9957),  # gemm-309: reads the weight
            (H100, "bf16", 8192, 8192, 8192, 1404.78),  # gemm-568
            (H100, "bf16", 4096, 1024, 16384, 166.299),  # gemm-933
            (H100, "bf16", 1, 8192, 8192, 49.184),  # gemm-574
            (H100, "fp8", 8192, 8192, 8192, 884.912),  # gemm-575
            (H100, "fp8", 1024, 6144, 4096, 57.9129),  # gemm-703
            (H100, "fp8", 1, 8192, 8192, 37.3973),  # gemm-581: mostly the cast's launches
            (L40S, "bf16", 8192, 8192, 8192, 4938.58),  # gemm-2626
            (L40S, "fp8", 8192, 8192, 8192, 3056.3),  # gemm-2633
        ],
    )
    def test_products(self, device: Device, precision: Precision, m: int, n: int, k: int, measured_us: float) -> None:
        assert float(gemm_seconds(device, m, n, k, precision)) * 1e6 == pytest.approx(measured_us, rel=0.15)

    def test_adding_to_a_result_costs_its_traffic(self) -> None:
        """Where few tokens make a large gradient, the buffer is what takes time: fp32 read and written over 1.5 TB/s."""
        written, added = (float(gemm_seconds(A100, 8192, 8192, 64, "fp16", result_bytes=b)) for b in (None, 8.0))
        stream = A100.memory_bandwidth_bytes_per_s * 0.78
        assert added - written == pytest.approx(8192**2 * 6 / stream, rel=0.1)
        full = [float(gemm_seconds(A100, 8192, 8192, 8192, "fp16", result_bytes=b)) for b in (None, 8.0)]
        assert full[1] == pytest.approx(full[0], rel=0.01)

    @pytest.mark.parametrize(
        ("queries", "causal", "backward", "tflop_per_s"),
        [
            (512, False, False, 467),
            (2048, False, False, 625),
            (16384, False, False, 648),
            (2048, True, False, 521),
            (16384, True, False, 616),
            (2048, False, True, 501),
            (16384, False, True, 561),
        ],
    )
    def test_flash_attention_3(self, queries: int, causal: bool, backward: bool, tflop_per_s: float) -> None:
        """arXiv 2407.08608, figures 5 and 6: head dimension 128, 16k tokens, an H100 SXM."""
        counted = 4 * 16_384 * queries * 16 * 128 * (0.5 if causal else 1) * (2.5 if backward else 1)
        seconds = attend(H100, queries, causal=causal, backward=backward)
        assert counted / seconds / 1e12 == pytest.approx(tflop_per_s, rel=0.1)

    def test_flash_attention_2_on_an_a100(self) -> None:
        """arXiv 2307.08691, abstract: up to 73 % of the theoretical maximum; head dimension 128, 16k keys."""
        rate = 4 * 16_384 * 16_384 * 16 * 128 / attend(A100, 16_384, causal=False)
        assert rate / 312e12 == pytest.approx(0.73, abs=0.02)

    def test_a_ring_starts_its_queries_once_a_step(self) -> None:
        once, twice, four = (attend(H100, 4096, kernels=kernels) for kernels in (1, 2, 4))
        assert once < twice < 1.1 * once
        assert four - twice == pytest.approx(2 * (twice - once), rel=0.05)

    def test_a_weight_gradient_of_gpt_28b(self) -> None:
        """arXiv 2401.10241, table 9: 2 layers of hidden size 6144 on 1024 tokens take 7.70 ms on an A100 SXM."""
        h, tokens = 6144, 1024
        shapes = [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)]
        seconds = 2 * sum(float(gemm_seconds(A100, k, n, tokens, "fp16")) for k, n in shapes)
        assert seconds * 1e3 == pytest.approx(7.70, rel=0.05)


class TestShape:
    def test_arrays_broadcast_and_agree_with_single_shapes(self) -> None:
        m, k = np.array([[1], [100], [5000]]), np.array([64, 4096])
        seconds = gemm_seconds(H100, m, 1024, k, "bf16", batch=3)
        assert seconds.shape == (3, 2)
        for i, j in np.ndindex(3, 2):
            assert seconds[i, j] == gemm_seconds(H100, m[i, 0], 1024, k[j], "bf16", batch=3)

    def test_a_product_costs_at_least_a_launch(self) -> None:
        assert gemm_seconds(A100, 1, 1, 1, "fp16") == pytest.approx(launch_seconds(A100), rel=0.2)

    def test_one_more_row_than_the_tiles_hold_starts_a_wave(self) -> None:
        full = gemm_seconds(A100, 256 * 108 // 8, 128 * 8, 4096, "fp16")
        assert gemm_seconds(A100, 256 * 108 // 8 + 1, 128 * 8, 4096, "fp16") > 1.05 * full

    def test_splitting_k_helps_a_small_result(self) -> None:
        """16 tiles of a long product would leave 116 of 132 multiprocessors idle."""
        unsplit = 2 * 256 * 128 * 65_536 / (sustained_flop_per_s(H100, "fp16") / H100.sm_count)
        assert gemm_seconds(H100, 512, 1024, 65_536, "fp16") < unsplit / 2

    def test_short_k_is_less_efficient(self) -> None:
        rate = 1 / gemm_seconds(H100, 8192, 8192, np.array([256, 1024, 8192]), "fp16") * np.array([256, 1024, 8192])
        assert rate[0] < 0.85 * rate[1] < 0.85 * rate[2]

    def test_causal_attention_saves_nearly_half_of_long_sequences_only(self) -> None:
        saved = [attend(H100, q, causal=True) / attend(H100, q, causal=False) for q in (256, 16_384)]
        assert saved[1] < 0.52 < 0.7 < saved[0]

    def test_decoding_reads_the_keys_and_values(self) -> None:
        cache = 2 * 64 * 8 * 8192 * 128 * 2
        shape = {"batch": 64, "heads": 64, "kv_heads": 8, "head_dim": 128}
        seconds = attend(H100, 1, 8192, **shape)
        assert seconds == pytest.approx(launch_seconds(H100) + cache / memory_bytes_per_s(H100), rel=0.05)

    def test_fused_attention_is_faster(self) -> None:
        assert attend(A100, 2048, causal=True) < 0.4 * attend(A100, 2048, flash=False)

    def test_unfused_backward_is_twice_the_products_and_half_again_the_softmax(self) -> None:
        assert 1.5 < attend(A100, 2048, flash=False, backward=True) / attend(A100, 2048, flash=False) < 2

    def test_a_pass_is_a_launch_and_its_bytes(self) -> None:
        assert pass_seconds(A100, 0) == launch_seconds(A100)
        assert pass_seconds(A100, [0, 1e9])[1] == launch_seconds(A100) + 1e9 / memory_bytes_per_s(A100)


class TestDevices:
    def test_measured_figures_replace_those_of_the_generation(self) -> None:
        probed = changed(H100, gemm_efficiency=0.5, memory_efficiency=0.6, launch_s=7e-6)
        assert sustained_flop_per_s(probed, "bf16") == 0.5 * H100.peak("bf16")
        assert memory_bytes_per_s(probed) == 0.6 * H100.memory_bandwidth_bytes_per_s
        assert launch_seconds(probed) == 7e-6

    def test_the_clock_follows_the_cube_root_of_the_power(self) -> None:
        half = changed(H100, power_w=H100.power_w / 8)
        assert sustained_flop_per_s(half, "bf16") == pytest.approx(sustained_flop_per_s(H100, "bf16") / 2)

    def test_no_power_budget_lifts_a_device_to_its_peak(self) -> None:
        assert sustained_flop_per_s(changed(H100, power_w=1e9), "bf16") < H100.peak("bf16")

    @pytest.mark.parametrize("name", sorted(catalog().devices))
    def test_every_device_has_sensible_defaults(self, name: str) -> None:
        device = find_device(name)
        assert 0.5 < sustained_flop_per_s(device, "fp16") / device.peak("fp16") < 1
        assert 0.7 < memory_bytes_per_s(device) / device.memory_bandwidth_bytes_per_s < 1
        assert 1e-6 < launch_seconds(device) < 1e-5

    def test_missing_units_are_refused(self) -> None:
        with pytest.raises(BadInput, match="no fp8 matrix units"):
            gemm_seconds(A100, 1, 1, 1, "fp8")


@settings(deadline=None)
@given(devices, precisions, sizes, sizes, sizes, st.integers(1, 64))
def test_no_product_beats_the_roofline(
    device: Device, precision: Precision, m: int, n: int, k: int, batch: int
) -> None:
    if precision not in device.peak_flop_per_s:
        return
    flop = 2.0 * m * n * k * batch
    weights = BYTES_PER_ELEMENT[precision] * (m * k + k * n) * batch
    seconds = gemm_seconds(device, m, n, k, precision, batch=batch)
    assert seconds > flop / device.peak(precision)
    assert seconds > weights / device.memory_bandwidth_bytes_per_s


@settings(deadline=None)
@given(devices, sizes, sizes, sizes, st.floats(1, 10))
def test_a_better_device_is_never_slower(device: Device, m: int, n: int, k: int, factor: float) -> None:
    peaks = {name: peak * factor for name, peak in device.peak_flop_per_s.items()}
    before = gemm_seconds(device, m, n, k, "fp16")
    faster = changed(device, peak_flop_per_s=peaks, power_w=device.power_w * factor)
    wider = changed(device, memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s * factor)
    stronger = changed(device, power_w=device.power_w * factor)
    for better in (faster, wider, stronger):
        assert gemm_seconds(better, m, n, k, "fp16") <= before * (1 + 1e-12)


@settings(deadline=None)
@given(devices, sizes, sizes, sizes, st.integers(0, 500))
def test_more_work_never_takes_less_time(device: Device, m: int, n: int, k: int, more: int) -> None:
    before = gemm_seconds(device, m, n, k, "fp16")
    assert gemm_seconds(device, m, n, k + more, "fp16") >= before
    # rows and columns that fill a started tile better come for free, and never earlier
    assert gemm_seconds(device, m + more, n, k, "fp16") >= before
    assert gemm_seconds(device, m, n + more, k, "fp16") >= before


@settings(deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(1, 5000),
    st.integers(0, 5000),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_attention_is_monotone(
    batch: int, kv_heads: int, shared: int, queries: int, past: int, backward: bool, causal: bool, flash: bool
) -> None:
    shape = {"batch": batch, "kv_heads": kv_heads, "heads": kv_heads * shared, "head_dim": 80}
    options = {"backward": backward, "causal": causal, "flash": flash}
    before = attend(A100, queries, queries + past, **shape, **options)
    assert 0 < before < float("inf")
    assert attend(A100, queries, queries + past + 300, **shape, **options) >= before
    assert attend(A100, queries, queries + past, **{**shape, "batch": batch + 1}, **options) >= before
    assert attend(A100, queries, queries + past, **shape, **{**options, "backward": True}) >= before


@given(st.floats(1e-3, 1e3))
def test_units_scale_exactly(factor: float) -> None:
    """A device whose every rate is k times higher, and whose every latency k times lower, is k times faster."""
    fast = changed(
        H100,
        peak_flop_per_s={name: peak * factor for name, peak in H100.peak_flop_per_s.items()},
        power_w=H100.power_w * factor,
        memory_bandwidth_bytes_per_s=H100.memory_bandwidth_bytes_per_s * factor,
        launch_s=launch_seconds(H100) / factor,
    )
    constants = replace(COMPUTE, cast_launch_s=COMPUTE.cast_launch_s / factor)
    for precision in ("bf16", "fp8"):
        slow_s = gemm_seconds(H100, 1000, 3000, 500, precision)  # type: ignore[arg-type]
        fast_s = gemm_seconds(fast, 1000, 3000, 500, precision, constants=constants)  # type: ignore[arg-type]
        assert fast_s * factor == pytest.approx(float(slow_s))
