"""`triaxial train` from outside: what it refuses and how, what it writes, and that the way it is started changes
nothing."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.command import MODEL, SEQ, TRIAXIAL, Workplace, read_metrics

from triaxial.model.spec import load_model_spec
from triaxial.train.optimizer import Hyperparameters, learning_rate

STEPS = 6
JOB = ("--layout", "tp=2", "--steps", str(STEPS), "--global-batch", "4", "--lr", "1e-2", "--warmup-steps", "2",
       "--eval-every", "3", "--seed", "5")  # fmt: skip
OWN_TABLE = """{"num_micro_batches": 4, "placement": [0, 1], "ranks": [
    {"actions": ["0F3", "0F1", "0F0", "0I3", "0F2", "0B1", "0B0", "0W3", "0B2"]},
    {"actions": ["1F3", "1B3", "1F1", "1B1", "1F0", "1B0", "1F2", "1B2"]}]}"""
"""An order that no generator writes."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "peak_memory_bytes", "bubble_fraction",
    "model_tflops", "data_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("place"))


# What is refused.


def config_file(folder: Path, without: str = "", **changes: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (MODEL | changes).items() if k != without}))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace full of traps."""
    place = Workplace(tmp_path_factory.mktemp("bad"))
    config_file(place.folder / "no-heads", without="num_attention_heads")
    config_file(place.folder / "strange", architectures=["MambaForCausalLM"])
    config_file(place.folder / "small-vocab", vocab_size=100)
    (place.folder / "taken").mkdir()
    (place.folder / "taken" / "notes.txt").write_text("mine")
    (place.folder / "typo.toml").write_text('model = "config.json"\ndata = "data"\nglobal_bacth = 8\n')
    (place.folder / "broken.toml").write_text("steps = = 3\n")
    (place.folder / "deadlock.json").write_text(OWN_TABLE.replace('"1F3", "1B3"', '"1B3", "1F3"'))
    (place.folder / "half.json").write_text(OWN_TABLE.replace(', "1B2"', ""))
    (place.folder / "own.json").write_text(OWN_TABLE)
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        (place.folder / "port").write_text(str(occupied.getsockname()[1]))
        yield place


USUAL = ("config.json", "--data", "data", "--seq-len", str(SEQ), "--out", "run")

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "tp that does not divide": (
        (*USUAL, "--layout", "tp=3"),
        "tp=3 cannot cut bad0 (4 heads, 2 kv heads, ffn 40); valid: 1, 2, 4",
    ),
    "bad layout string": (
        (*USUAL, "--layout", "tp=2,pp"),
        "layout: 'pp' is not KEY=VALUE with KEY one of tp, pp, dp, cp, ep, vpp, mb,",
    ),
    "batch that dp does not divide": (
        (*USUAL, "--layout", "dp=3", "--global-batch", "8"),
        "global batch 8 is not a multiple of dp*mb=3; nearest: 9",
    ),
    "empty data folder": (
        (*USUAL, "--data", "empty"),
        "folder empty holds no .txt, .jsonl, .parquet or source code file",
    ),
    "data that is not there": ((*USUAL, "--data", "nowhere"), "no data at nowhere: give a .txt"),
    "missing --data": (("config.json", "--out", "run"), "data is missing: give --data, or name it in --config"),
    "missing model": (
        ("--data", "data", "--out", "run"),
        "model is missing: give MODEL or --init, or name it in --config",
    ),
    "sequence longer than the model's": (
        (*USUAL, "--seq-len", "65"),
        "sequence length 65 is more than the 64 positions of bad0",
    ),
    "sequence longer than the data": (
        ("tiny-byte", "--data", "config.json", "--seq-len", "500", "--out", "run"),
        "sequence length 500 needs 501 tokens and config.json holds",
    ),
    "vocabulary smaller than the data's": (
        ("small-vocab", *USUAL[1:]),
        "data holds token id 117 and the model's vocabulary is 100: use the tokenizer that belongs to the model",
    ),
    "unknown TOML setting": (
        ("--config", "typo.toml", "--out", "run"),
        "training settings: global_bacth is not one of model, data, out,",
    ),
    "broken TOML": (("--config", "broken.toml"), "broken.toml: Invalid value (at line 1, column 9)"),
    "missing config.json field": (
        ("no-heads", *USUAL[1:]),
        "no-heads/config.json: num_attention_heads is missing",
    ),
    "unknown architecture": (
        ("strange", *USUAL[1:]),
        "strange/config.json: architecture 'MambaForCausalLM' is not supported; known: ",
    ),
    "schedule table that is not there": (
        (*USUAL, "--layout", "pp=2", "--schedule-table", "nowhere.json"),
        "cannot read nowhere.json: No such file or directory",
    ),
    "schedule table that is none": (
        (*USUAL, "--layout", "pp=2", "--schedule-table", "config.json"),
        "schedule table: num_micro_batches: Field required",
    ),
    "schedule table that lacks an action": (
        (*USUAL, "--layout", "pp=2", "--global-batch", "4", "--schedule-table", "half.json"),
        "rank 1: 1B2 (backward of micro-batch 2 on stage 1) is missing",
    ),
    "schedule table that deadlocks": (
        (*USUAL, "--layout", "pp=2", "--global-batch", "4", "--schedule-table", "deadlock.json"),
        "the schedule would deadlock: rank 1: 1B3 (backward of micro-batch 3 on stage 1) needs 1F3 (forward of "
        "micro-batch 3 on stage 1), which rank 1 does later",
    ),
    "schedule table for another batch": (
        (*USUAL, "--layout", "pp=2", "--global-batch", "8", "--schedule-table", "own.json"),
        "the schedule's table has 4 micro-batches, but a step of this layout and global batch has 8",
    ),
    "schedule table for another pipeline": (
        (*USUAL, "--layout", "pp=4", "--global-batch", "4", "--schedule-table", "own.json"),
        "the schedule's table has 2 ranks, but the layout has pp=4",
    ),
    "wrong value": ((*USUAL, "--steps", "0"), "training settings: steps: Input should be greater than 0"),
    "occupied port": (
        (*USUAL, "--layout", "tp=2", "--port", "PORT"),
        "port PORT cannot be used (Address already in use): choose another --port",
    ),
    "--out that is not empty": (
        (*USUAL, "--out", "taken"),
        "taken exists and is not empty: choose another --out",
    ),
    "--out below a file": (
        (*USUAL, "--out", "port/run"),
        "cannot write to port: choose another --out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(bad: Workplace, case: str) -> None:
    arguments, sentence = REFUSED[case]
    port = (bad.folder / "port").read_text()
    arguments, sentence = tuple(a.replace("PORT", port) for a in arguments), sentence.replace("PORT", port)
    sentence = sentence.replace("bad0", bad.folder.name)
    before = bad.contents()
    done = bad.run("train", *arguments)
    assert done.stderr.startswith(f"triaxial: {sentence}")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert bad.contents() == before


def test_a_world_of_another_size_is_refused_under_torchrun(place: Workplace) -> None:
    before = place.contents()
    done = place.run(*TRIAXIAL[1:], "train", *USUAL, "--layout", "tp=2", program=torchrun(1))
    assert "triaxial: layout tp=2,pp=1,dp=1,mb=1 has 2 ranks and torchrun started 1\n" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert place.contents() == before


def torchrun(processes: int) -> tuple[str, ...]:
    return (*TORCHRUN, f"--nproc-per-node={processes}", "--no-python", sys.executable)


# What a run writes, and that it is always the same.


@pytest.fixture(scope="module")
def by_flags(place: Workplace) -> subprocess.CompletedProcess[str]:
    return place.train(*JOB, "--out", "flags")


@pytest.fixture(scope="module")
def steps(place: Workplace, by_flags: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert by_flags.returncode == 0, by_flags.stderr
    return read_metrics(place.folder / "flags")[0]


def numbers(out: Path) -> list[tuple[float, ...]]:
    """What must not depend on how a run is started: everything but times and memory."""
    steps, evaluations = read_metrics(out)
    told = [(s["step"], s["loss"], s["grad_norm"], s["lr"]) for s in steps]
    return told + [(e["step"], e["eval_loss"]) for e in evaluations]


def test_a_run_tells_where_it_is_and_how_it_goes(by_flags: subprocess.CompletedProcess[str]) -> None:
    assert by_flags.stdout == "run: flags\n"
    lines = by_flags.stderr.splitlines()
    assert len([line for line in lines if line.startswith("step ")]) == STEPS
    assert len([line for line in lines if line.startswith("after step ")]) == 2
    assert len(lines) == STEPS + 2  # and no noise of launching
    assert lines[-1].startswith(f"after step {STEPS}: validation loss ")


def test_every_step_has_every_key(place: Workplace, steps: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in steps] == list(range(STEPS))
    tokens, spec = 4 * SEQ, load_model_spec(place.folder / "config.json")
    hyper = Hyperparameters(lr=1e-2, warmup_steps=2)
    for step in steps:
        assert step.keys() == KEYS
        assert all(math.isfinite(value) for value in step.values())
        assert step["lr"] == learning_rate(step["step"], STEPS, hyper)
        assert step["tokens_per_s"] == pytest.approx(tokens / step["step_time_s"])
        flop = spec.train_flop_per_token(SEQ) * tokens
        assert step["model_tflops"] == pytest.approx(flop / step["step_time_s"] / 2 / 1e12)
        assert 0 <= step["bubble_fraction"] < 1
        assert 0 < step["data_s"] < step["step_time_s"]
        assert step["peak_memory_bytes"] > 50 << 20
        assert step["grad_norm"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1


def test_the_validation_loss_is_written_when_asked_and_at_the_end(
    place: Workplace, steps: list[dict[str, Any]]
) -> None:
    evaluations = read_metrics(place.folder / "flags")[1]
    assert [e["step"] for e in evaluations] == [2, 5]
    assert steps[-1]["loss"] - 1 < evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


@pytest.mark.usefixtures("by_flags")
def test_the_run_folder_holds_settings_metrics_a_timeline_and_tensorboard(place: Workplace) -> None:
    out = place.folder / "flags"
    assert {path.name for path in out.iterdir()} == {
        "settings.json", "metrics.jsonl", "timeline.json", "tensorboard", "model", "checkpoints",
    }  # fmt: skip
    timeline = json.loads((out / "timeline.json").read_text())
    assert (timeline["step"], len(timeline["ranks"])) == (2, 1), "the third step, of one pipeline rank"
    assert len(timeline["ranks"][0]["begin_s"]) == 2 * timeline["num_micro_batches"]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["layout"], settings["lr"], settings["seed"]) == ("tp=2,pp=1,dp=1,mb=1", 1e-2, 5)
    assert [path.name.split(".")[0] for path in (out / "tensorboard").iterdir()] == ["events"]


@pytest.mark.usefixtures("by_flags")
def test_a_toml_file_gives_the_same_run_bitwise(place: Workplace) -> None:
    (place.folder / "job.toml").write_text(
        f'model = "config.json"\ndata = "data"\nlayout = "tp=2"\nsteps = {STEPS}\nglobal_batch = 4\nlr = 1e-2\n'
        f"warmup_steps = 2\neval_every = 3\nseed = 99\nseq_len = {SEQ}\nzero = 0\nrecompute = 'none'\n"
    )
    done = place.run("train", "--config", "job.toml", "--seed", "5", "--out", "toml")
    assert (done.returncode, done.stdout) == (0, "run: toml\n")
    assert numbers(place.folder / "toml") == numbers(place.folder / "flags")


@pytest.mark.usefixtures("by_flags")
def test_joining_torchrun_gives_the_same_run_bitwise(place: Workplace) -> None:
    program = torchrun(2)
    arguments = ("train", "config.json", "--data", "data", "--seq-len", str(SEQ), *JOB, "--out", "torchrun")
    done = place.run(*TRIAXIAL[1:], *arguments, program=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run: torchrun\n"
    assert numbers(place.folder / "torchrun") == numbers(place.folder / "flags")


def test_a_schedule_of_ones_own_is_followed_recorded_and_drawn(place: Workplace, steps: list[dict[str, Any]]) -> None:
    (place.folder / "own.json").write_text(OWN_TABLE)
    done = place.train(*JOB, "--layout", "pp=2", "--schedule-table", "own.json", "--out", "own", OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, "run: own\n"), done.stderr
    out = place.folder / "own"
    assert [s["loss"] for s in read_metrics(out)[0]] == pytest.approx([s["loss"] for s in steps], rel=1e-4)
    assert json.loads((out / "settings.json").read_text())["schedule_table"] == "own.json"
    table, kept = json.loads(OWN_TABLE), json.loads((out / "timeline.json").read_text())
    assert [rank["actions"] for rank in kept["ranks"]] == [rank["actions"] for rank in table["ranks"]]
    picture = (out / "timeline.svg").read_text()
    assert picture.index("predicted: own, 4 micro-batches") < picture.index("measured: step 3")


def test_stopping_early_in_bf16_keeps_the_learning_rates(place: Workplace, steps: list[dict[str, Any]]) -> None:
    """And one process computes what two did, to bf16's precision."""
    changes = ("--layout", "tp=1", "--precision", "bf16", "--stop-after", "4")
    done = place.train(*JOB, *changes, "--out", "stopped", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    stopped, evaluations = read_metrics(place.folder / "stopped")
    assert [s["lr"] for s in stopped] == [s["lr"] for s in steps[:4]]
    assert [s["loss"] for s in stopped] == pytest.approx([s["loss"] for s in steps[:4]], rel=1e-2)
    assert [s["loss"] for s in stopped] != [s["loss"] for s in steps[:4]]
    assert [e["step"] for e in evaluations] == [2, 3]
