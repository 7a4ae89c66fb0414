"""`triaxial bench`: training unless told otherwise, and what it says to odd input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from triaxial import BadInput, NoAnswer
from triaxial.cli import cli
from triaxial.cluster.spec import Cluster
from triaxial.measure import bench_serving, bench_training
from triaxial.measure.bench_serving import ServingMeasured
from triaxial.measure.compare import TERMS, Comparison, Measured
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training
from triaxial.train.config import TrainConfig

CLUSTER = "1x2xA100-SXM4-80GB"
WORK = Training(global_batch=8, seq_len=256, precision="fp32")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *arguments], standalone_mode=False)


@pytest.fixture(autouse=True)
def fake_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes 1 s a step whatever the layout, serving 10 ms a token, and pp=2 always fails."""

    def launch(config: TrainConfig) -> bool:
        if config.parsed_layout.pp == 2:
            raise NoAnswer("rank 0 failed: out of memory")
        return True

    def compare(out: Path, cluster: Cluster) -> Comparison:
        priced = estimate(load_model_spec("tiny-byte"), cluster, WORK, parse_layout("tp=2,mb=8"))
        return Comparison(replace(priced, step_time_s=0.5), Measured(1.0, 0.5, 0.0, dict.fromkeys(TERMS, 0.25)))

    async def serve(settings: bench_serving.EngineSettings, *_: object) -> ServingMeasured:
        if settings.parsed_layout.pp == 2:
            raise NoAnswer("rank 0: ended by SIGKILL")
        return ServingMeasured(0.1, 0.01, 100.0, 0.5)

    monkeypatch.setattr(bench_training, "launch", launch)
    monkeypatch.setattr(bench_training, "compare_run", compare)
    monkeypatch.setattr(bench_serving, "_serve", serve)


@pytest.mark.parametrize("word", [[], ["train"]])
def test_training_unless_told_otherwise(word: list[str]) -> None:
    done = run("tiny-byte", *word, "--cluster", CLUSTER, "--layouts", "tp=2,mb=8 pp=2,mb=1", "--json")
    assert done.exception is None
    document = json.loads(done.stdout)
    first, second = document["layouts"]
    assert (first["layout"], first["measured_step_time_s"], first["relative_error"]) == (
        "tp=2,pp=1,dp=1,mb=8",
        1.0,
        -0.5,
    )
    assert (second["measured_step_time_s"], second["error"]) == (None, "rank 0 failed: out of memory")
    assert document["regret"] == 0
    assert document["rank_correlation"] is None


def test_serving_is_a_word(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    done = run("tiny-byte", "--cluster", CLUSTER, "serve", "--input", "8", "--output", "4", "--out", str(out))
    assert done.exception is None
    assert "tp=1,pp=2,dp=1,mb=1: rank 0: ended by SIGKILL" in done.stdout
    layouts = json.loads((out / "bench.json").read_text())["layouts"]
    assert [row["measured_output_tokens_per_s"] for row in layouts] == [100.0, None, 100.0]


def test_when_no_layout_runs_the_answer_is_no() -> None:
    done = run("tiny-byte", "serve", "--cluster", CLUSTER, "--layouts", "pp=2")
    assert isinstance(done.exception, NoAnswer)
    assert "ended by SIGKILL" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layouts", "tp=4"], "tp\\*cp\\*dp\\*pp is 4 ranks, but .* has 2 GPUs"),
        (["--layouts", "wide"], "'wide' is not KEY=VALUE"),
        (["--layouts", " "], "name layouts like"),
        (["--out", "."], "exists and is not empty: choose another --out"),
        (["serve", "--layouts", "tp=4"], "4 ranks are more than the 2 GPUs"),
        (["serve", "--concurrency", "0"], "concurrency must be at least 1"),
    ],
)
def test_odd_input_is_one_sentence(arguments: list[str], words: str) -> None:
    done = run("tiny-byte", "--cluster", CLUSTER, *arguments)
    assert isinstance(done.exception, BadInput)
    assert done.stdout == ""
    with pytest.raises(BadInput, match=words):
        raise done.exception


def test_a_missing_cluster_file_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("tiny-byte")
    assert str(done.exception) == "there is no cluster.toml here: run `triaxial probe` first"
