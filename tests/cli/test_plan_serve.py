"""`triaxial plan ... serve`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from triaxial.cli import cli

PLAN = ["plan", "llama-3.1-8b", "--cluster", "1x2xH100-SXM", "serve", "--requests", "100", "--no-flips"]
CHAT = ["--input", "512", "--output", "lognormal:64:0.5"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def answer(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_plan_has_the_documented_keys(tmp_path: Path) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    found = answer(*PLAN, *CHAT, "--tpot", "0.03", "--price", "2", "--out", str(out), "--html", str(page))
    assert json.loads(out.read_text()) == found
    best = found["plans"][0]
    assert {
        "layout", "ttft_s", "tpot_s", "output_tokens_per_s", "tokens_per_s_per_gpu", "max_batch", "chunk_tokens",
        "memory_gib", "fits", "gpus", "replicas", "percentiles", "requests_per_s", "goodput_requests_per_s",
        "queueing_share", "utilisation", "decode_batch", "preemptions", "gpu_hours_per_million_tokens",
        "cost_per_million_tokens",
    } == set(best)  # fmt: skip
    assert set(best["percentiles"]["tpot_s"]) == {"mean", "p50", "p90", "p99"}
    assert best["percentiles"]["tpot_s"]["p90"] <= 0.03
    per_gpu = [plan["tokens_per_s_per_gpu"] for plan in found["plans"]]
    assert per_gpu == sorted(per_gpu, reverse=True)
    assert found["why"]["sentences"]
    assert found["frontier"]
    assert found["workload"]["kind"] == "serving"
    html = page.read_text()
    starts = [index for index in range(len(html)) if html.startswith("<svg", index)]
    assert len(starts) == 2
    for start in starts:
        ElementTree.fromstring(html[start : html.index("</svg>", start) + 6])


def test_people_get_a_table_the_reasons_and_the_frontier() -> None:
    result = run(*PLAN, *CHAT, "--rate", "5", "--objective", "gpus")
    assert result.exit_code == 0, result.output
    for word in ("TTFT p50/p90", "gives the fewest GPUs", "What binds is", "carry up to", "Frontier"):
        assert word in result.output


def test_a_trace_is_the_traffic(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{second / 4},{200 + 7 * second},{20 + second % 5}" for second in range(60)]
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "\n".join(rows) + "\n")
    found = answer(*PLAN, "--trace", str(trace), "--objective", "latency")
    assert found["workload"]["requests"] == 60
    assert found["workload"]["rate"] == pytest.approx(60 / 14.75)
    faster = answer(*PLAN, "--trace", str(trace), "--objective", "latency", "--rate", "40")
    assert faster["plans"][0]["requests_per_s"] == pytest.approx(40)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([*PLAN], 2, "in one way"),
        ([*PLAN, "--input", "12x", "--output", "3"], 2, "--input '12x' is no length"),
        ([*PLAN, "--input", "12"], 2, "--output is missing"),
        ([*PLAN, "--trace", "no-such.csv"], 2, "cannot read no-such.csv"),
        ([*PLAN, *CHAT, "--rate", "0"], 2, "--rate must be more than zero"),
        ([*PLAN, *CHAT, "--ttft", "-1"], 2, "--ttft must be more than zero"),
        ([*PLAN, *CHAT, "--objective", "cost"], 2, "--price"),
        ([*PLAN, *CHAT, "--precision", "fp12"], 2, "precision must be one of"),
        ([*PLAN, *CHAT, "--objective", "speed"], 2, "'speed' is not one of"),
        ([*PLAN, *CHAT, "--out", "no-such-folder/plan.json"], 2, "cannot write no-such-folder/plan.json"),
        ([*PLAN, *CHAT, "--tpot", "0.0001"], 1, "the best TPOT"),
        ([*PLAN, *CHAT, "--rate", "400", "--objective", "gpus"], 1, "GPUs that would do are about"),
        (["plan", "llama-3.1-70b", "--cluster", "1x1xH100-SXM", "serve", *CHAT], 1, "smallest cluster that would do"),
    ],
)
def test_bad_questions_get_one_sentence(
    arguments: list[str], code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triaxial.cli import main

    monkeypatch.setattr(sys, "argv", ["triaxial", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == code
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_planning_to_serve_never_imports_torch() -> None:
    script = (
        "import sys; from triaxial.cli import cli\n"
        f"cli({[*PLAN, *CHAT]!r}, standalone_mode=False)\n"
        "assert not {'torch', 'scipy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
