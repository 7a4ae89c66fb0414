"""The planning commands: what they print, and how they end."""

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
from triaxial.cli.options import parse_count

TRAIN = ["train", "--global-batch", "64", "--seq-len", "2048"]
PLAN = ["plan", "llama-3.1-8b", "--cluster", "1x8xH100-SXM"]
ESTIMATE = ["estimate", "llama-3.1-8b", "--cluster", "1x8xH100-SXM", "--layout", "tp=2,dp=4,zero=1"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def answer(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_estimate_prints_the_documented_keys() -> None:
    priced = answer(*ESTIMATE, *TRAIN)
    assert {
        "step_time_s",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
        "model_tflops_per_gpu",
        "mfu",
        "bubble_fraction",
        "fits",
        "memory_gib",
        "time_s",
        "hidden_s",
        "layout",
    } == set(priced)
    assert {"compute", "exposed_tp", "exposed_pp", "exposed_dp", "bubble", "optimizer"} <= set(priced["time_s"])
    assert sum(priced["time_s"].values()) == pytest.approx(priced["step_time_s"])
    assert priced["layout"] == "tp=2,pp=1,dp=4,mb=1,zero=1"


def test_plan_ranks_layouts_and_says_why(tmp_path: Path) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    found = answer(*PLAN, *TRAIN, "--top", "3", "--no-flips", "--tokens", "1T", "--out", str(out), "--html", str(page))
    times = [plan["step_time_s"] for plan in found["plans"]]
    assert len(times) == 3
    assert times == sorted(times)
    assert found["why"]["sentences"]
    assert found["whole_run"]["gpu_hours"] == pytest.approx(found["whole_run"]["days"] * 24 * 8)
    assert json.loads(out.read_text()) == found
    html = page.read_text()
    pictures = [
        html[start : html.index("</svg>", start) + 6] for start in range(len(html)) if html.startswith("<svg", start)
    ]
    assert len(pictures) >= 2
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_plan_prints_a_table_and_reasons_for_people() -> None:
    result = run(*PLAN, *TRAIN, "--no-flips", "--why-not", "tp=8")
    assert result.exit_code == 0, result.output
    assert "MFU" in result.output
    assert "What binds is" in result.output
    assert "Not tp=8" in result.output


def test_the_best_plan_is_what_estimate_says_of_it() -> None:
    best = answer(*PLAN, *TRAIN, "--top", "1", "--no-flips")["plans"][0]
    assert answer(*ESTIMATE[:-1], best["layout"], *TRAIN) == best


def test_validate_prints_every_row_and_its_summaries() -> None:
    found = answer("validate")
    assert {"id", "predicted", "measured", "relative_error"} <= set(found["rows"][0])
    for summary in [*found["sources"].values(), found["all"]]:
        assert {"count", "median", "p90", "bias"} <= set(summary)
    assert run("validate").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["plan", "llama-9", "--cluster", "1x8xH100-SXM", *TRAIN], 2, "no model 'llama-9'"),
        (["plan", "llama-3.1-8b", "--cluster", "1x8xH1000", *TRAIN], 2, "H1000"),
        ([*PLAN, "train", "--global-batch", "0", "--seq-len", "2048"], 2, "global-batch must be at least 1"),
        ([*PLAN, *TRAIN, "--precision", "bf17"], 2, "precision must be one of"),
        ([*PLAN, *TRAIN, "--tokens", "lots"], 2, "no number of tokens"),
        ([*PLAN, *TRAIN, "--objective", "cost"], 2, "--gpu-price"),
        ([*PLAN], 2, "Missing command"),
        ([*ESTIMATE[:-1], "tp=2", *TRAIN], 2, "2 ranks, but 1x8xH100-SXM has 8 GPUs"),
        (["plan", "llama-3.1-405b", "--cluster", "1x8xA100", *TRAIN], 1, "smallest cluster that would do"),
        (["validate", "--csv", "no-such.csv"], 2, "cannot read no-such.csv"),
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


def test_planning_never_imports_torch() -> None:
    script = (
        "import sys; from triaxial.cli import cli\n"
        f"cli({[*ESTIMATE, *TRAIN]!r}, standalone_mode=False)\n"
        "assert not {'torch', 'scipy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(("text", "tokens"), [("15T", 15e12), ("300B", 3e11), ("2e12", 2e12), ("1.5M", 1.5e6)])
def test_token_counts_are_read_as_people_write_them(text: str, tokens: float) -> None:
    assert parse_count(text) == pytest.approx(tokens)
