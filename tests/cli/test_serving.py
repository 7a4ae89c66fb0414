"""`triaxial estimate ... serve` and `triaxial validate` of serving measurements, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.plan.validation.test_serving import BATCHES, LOOP, STATIC

from triaxial.cli import cli


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def estimate(*options: str, layout: str = "tp=4,dp=2") -> Result:
    where = ("estimate", "llama-3.1-70b", "--cluster", "8xH100-SXM", "--layout", layout)
    return run(*where, "serve", "--input", "1024", "--output", "128", "--precision", "fp8", *options)


class TestEstimate:
    def test_json_holds_the_contract(self) -> None:
        result = estimate("--rate", "4", "--json")
        assert result.exit_code == 0
        found: dict[str, Any] = json.loads(result.stdout)
        assert set(found) >= {"ttft_s", "tpot_s", "output_tokens_per_s", "tokens_per_s_per_gpu", "max_batch", "fits"}
        assert found["layout"] == "tp=4,pp=1,dp=2,mb=1"
        assert found["fits"] is True
        assert 0.03 < found["ttft_s"] < 0.3
        assert 0.008 < found["tpot_s"] < 0.03
        assert found["output_tokens_per_s"] == pytest.approx(4 * 128, rel=0.1)
        assert found["tokens_per_s_per_gpu"] == found["output_tokens_per_s"] / 8
        assert 16 < found["memory_gib"]["weights"] < 19
        assert set(found["decode_s"]) == set(found["prefill_s"]) > {"weights", "kv", "all_reduce", "host"}

    def test_the_table_names_what_takes_time(self) -> None:
        result = estimate("--concurrency", "16", "--engine", "tensorrt-llm")
        assert result.exit_code == 0
        for word in ("tensorrt-llm", "time to first token", "decode step", "all-reduce", "kv cache", "fits"):
            assert word in result.stdout

    def test_what_does_not_fit_says_so(self) -> None:
        found = json.loads(estimate("--precision", "bf16", "--json", layout="tp=1").stdout)
        assert (found["fits"], found["max_batch"]) == (False, 0)

    @pytest.mark.parametrize(
        ("options", "layout", "message"),
        [
            (("--rate", "-1"), "tp=4", "rate must be more than zero, not -1.0"),
            (("--precision", "fp2"), "tp=4", "precision must be one of"),
            ((), "tp=5", "tp=5 cannot cut"),
            ((), "tp=8,pp=4", "more than the 8 GPUs"),
        ],
    )
    def test_bad_input_is_one_sentence(self, options: tuple[str, ...], layout: str, message: str) -> None:
        result = estimate(*options, layout=layout)
        assert message in str(result.exception)


class TestValidate:
    def test_points(self, tmp_path: Path) -> None:
        path = tmp_path / "static.csv"
        path.write_text(STATIC)
        found = json.loads(run("validate", "--csv", str(path), "--json").stdout)
        assert [row["id"] for row in found["rows"]] == [*BATCHES[:3], "queue-1", *BATCHES[3:]]
        first = found["rows"][0]
        assert first["relative_error"] == pytest.approx(first["predicted"] / first["measured"] - 1)
        assert found["all"]["batch"]["count"] == found["left_out"]["all"]["batch"]["count"] == 5
        assert set(found["sources"]) == {"ft batch", "queue queue", "trt batch"}
        assert found["ranking"]["latency"]["jobs"] == 1
        assert [row["id"] for row in found["skipped"]] == ["odd-1", "odd-2", "odd-3"]

    def test_the_table_shows_every_source(self, tmp_path: Path) -> None:
        path = tmp_path / "loop.csv"
        path.write_text(LOOP)
        result = run("validate", "--csv", str(path))
        assert result.exit_code == 0
        for word in ("vllm Llama-3.1-70B", "TPOT, experts", "roofline", "Kendall tau"):
            assert word in result.stdout

    def test_kinds_do_not_mix(self, tmp_path: Path) -> None:
        points, training = tmp_path / "points.csv", tmp_path / "training.csv"
        points.write_text(STATIC)
        training.write_text("id,gpu,step_time_s\n1,H100,2\n")
        result = run("validate", "--csv", str(points), "--csv", str(training))
        assert "one kind of measurement at a time" in str(result.exception)
