"""`triaxial train --resume` from outside: the run goes on in its folder as if it had never stopped, under any layout."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from tests.cli.test_train import numbers
from tests.command import Workplace

STEPS = 8
JOB = ("--steps", str(STEPS), "--global-batch", "4", "--lr", "1e-2", "--eval-every", "4", "--precision", "fp64")
SAVING = ("--checkpoint-every", "2", "--stop-after", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with a run that was not interrupted, `whole`, and one that has left off after half its steps."""
    place = Workplace(tmp_path_factory.mktemp("place"))
    for arguments in (("--out", "whole"), (*SAVING, "--out", "half")):
        done = place.train(*JOB, *arguments, "--layout", "tp=2")
        assert done.returncode == 0, done.stderr
    return place


def half(place: Workplace, name: str) -> Path:
    return shutil.copytree(place.folder / "half", place.folder / name, symlinks=True)


def test_a_run_goes_on_where_it_left_off_bitwise(place: Workplace) -> None:
    run = half(place, "same")
    done = place.run("train", "--resume", "same")
    assert (done.returncode, done.stdout) == (0, "run: same\n"), done.stderr
    assert done.stderr.splitlines()[0] == "same goes on after step 4"
    assert len([line for line in done.stderr.splitlines() if line.startswith("step ")]) == STEPS // 2
    assert numbers(run) == numbers(place.folder / "whole")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step-00000006", "step-00000008"}


def test_saves_are_recorded_with_what_they_cost(place: Workplace) -> None:
    records = [json.loads(line) for line in (place.folder / "half" / "metrics.jsonl").open()]
    saves = [record for record in records if "checkpoint_s" in record]
    assert [save["step"] for save in saves] == [1, 3]
    for save, step in zip(saves, (2, 4), strict=True):
        files = (place.folder / "half" / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
        assert save["checkpoint_bytes"] == sum(file.stat().st_size for file in files)
        assert 0 <= save["checkpoint_stall_s"] <= save["checkpoint_s"]


def test_another_layout_goes_on_with_the_same_numbers(place: Workplace) -> None:
    run, layout = half(place, "other"), "tp=1,pp=2,dp=2,mb=1,zero=3"
    done = place.run("train", "--resume", "other", "--layout", layout)
    assert done.returncode == 0, done.stderr
    for now, then in zip(numbers(run), numbers(place.folder / "whole"), strict=True):
        assert now == pytest.approx(then, rel=1e-12)
    assert json.loads((run / "settings.json").read_text())["layout"] == layout


def test_a_broken_file_of_another_rank_is_named_and_the_checkpoint_before_taken(place: Workplace) -> None:
    run = half(place, "broken")
    with (run / "checkpoints" / "step-00000004" / "rank-00001.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = place.run("train", "--resume", "broken")
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith("step-00000004 is broken: rank-00001.safetensors has 1000 bytes instead of ")
    assert second == "broken goes on after step 2"
    assert numbers(run) == numbers(place.folder / "whole")


def test_a_run_with_nothing_whole_is_refused_in_one_sentence(place: Workplace) -> None:
    run = half(place, "hopeless")
    for manifest in (run / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    done = place.run("train", "--resume", "hopeless")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "triaxial: hopeless/checkpoints holds no checkpoint that is whole: step-00000004 is broken: manifest.json "
        "is damaged; step-00000002 is broken: manifest.json is damaged\n"
    )


def test_after_kill_9_of_the_launcher_no_step_is_lost_or_repeated(place: Workplace) -> None:
    run = place.start("killed", *JOB[2:], "--layout", "tp=2", "--checkpoint-every", "1").wait_for_steps(5)
    run.signal(signal.SIGKILL)
    assert run.end(20)[0] == -signal.SIGKILL
    saved = max(int(path.name[5:]) for path in (run.out / "checkpoints").glob("step-????????"))
    done = place.run("train", "--resume", "killed", "--stop-after", str(saved + 3))
    assert done.returncode == 0, done.stderr
    assert f"killed goes on after step {saved}\n" in done.stderr
    again = place.train(
        "--steps", "1000000", *JOB[2:], "--layout", "tp=2", "--stop-after", str(saved + 3), "--out", "a"
    )
    assert again.returncode == 0, again.stderr
    assert numbers(run.out) == numbers(place.folder / "a")


REFUSED = {
    "another seed": (("half", "--seed", "3"), "seed of half is 0 and cannot become 3: leave it out"),
    "another batch": (("half", "--global-batch", "8"), "global_batch of half is 4 and cannot become 8: leave it out"),
    "another folder": (("half", "--out", "new"), "a resumed run goes on in its own folder, half: leave out --out"),
    "no run": (("data",), "data holds no run to resume: settings.json: No such file or directory"),
    "a layout that does not fit": (
        ("half", "--layout", "dp=3"),
        "global batch 4 is not a multiple of dp*mb=3; nearest: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_run_is_refused_and_nothing_is_written(place: Workplace, case: str) -> None:
    arguments, sentence = REFUSED[case]
    before = place.contents()
    done = place.run("train", "--resume", *arguments)
    assert done.stderr.startswith(f"triaxial: {sentence}")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert place.contents() == before
