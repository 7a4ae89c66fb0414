"""A checkpoint that is damaged is named and passed over; a disk that is full costs the checkpoint, not the run."""

from __future__ import annotations

import json
import pickle
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command import MODEL, read_metrics
from tests.world import World
from triaxial import BadInput
from triaxial.train.checkpoint.folder import MANIFEST, Manifest, crc32_of
from triaxial.train.checkpoint.save import _Copy
from triaxial.train.config import TrainConfig, continue_run, make_config
from triaxial.train.corpus import Corpus, build_corpus
from triaxial.train.tokenizer import ByteTokenizer
from triaxial.train.trainer import Place, Trainer

STEPS, SAVED = 6, (2, 4)


class Workshop:
    """A tiny job and the run that others are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.json").write_text(json.dumps(MODEL))
        (folder / "text.txt").write_text("\n".join(f"{i} squared is {i * i}." for i in range(120)))
        self.corpus = build_corpus(folder / "text.txt", ByteTokenizer(), folder / "cache")
        self.whole = folder / "whole"
        self.train(self.settings("whole", keep_last=9))
        self.saved = folder / "saved"
        self.train(self.settings("saved", stop_after=SAVED[-1]))

    def settings(self, out: str, **more: Any) -> dict[str, Any]:
        files = {"model": str(self.folder / "config.json"), "data": self.folder / "text.txt"}
        sizes = {
            "seq_len": 32,
            "global_batch": 4,
            "steps": STEPS,
            "warmup_steps": 2,
            "precision": "fp64",
            "timeout": 100,
        }
        return files | sizes | {"out": self.folder / out, "checkpoint_every": 2} | more

    def train(self, settings: dict[str, Any]) -> None:
        Trainer(make_config(settings), self.corpus, Place()).run()

    def copy(self, to: Path) -> Path:
        return shutil.copytree(self.saved, to / "run", symlinks=True)

    def resume(self, run: Path, **given: Any) -> None:
        self.train(continue_run(run, given))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


class Payload:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def weights(checkpoint: Path) -> Path:
    return checkpoint / "rank-00000.safetensors"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    with weights(checkpoint).open("r+b") as file:
        file.truncate(weights(checkpoint).stat().st_size - 8)


def plant(checkpoint: Path) -> None:
    """A pickle in place of the tensors, with a manifest that tells of it."""
    path = weights(checkpoint)
    path.write_bytes(pickle.dumps(Payload(checkpoint.parents[1] / "executed")))
    manifest = Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes())
    entry = manifest.files[path.name].model_copy(update={"bytes": path.stat().st_size, "crc32": crc32_of(path)})
    forged = manifest.model_copy(update={"files": {path.name: entry}})
    (checkpoint / MANIFEST).write_text(forged.sealed().model_dump_json())


def plant_beside(checkpoint: Path) -> None:
    (checkpoint / "extra.pt").write_bytes(pickle.dumps(Payload(checkpoint.parents[1] / "executed")))


def plant_as_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(pickle.dumps(Payload(checkpoint.parents[1] / "executed")))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"rank-00000.safetensors has \d+ bytes instead of \d+"),
    "a bit of a tensor": (lambda c: flip(weights(c), -100), "rank-00000.safetensors is damaged: its checksum differs"),
    "a bit of the header": (lambda c: flip(weights(c), 50), "rank-00000.safetensors is damaged: its checksum differs"),
    "a missing file": (lambda c: weights(c).unlink(), "rank-00000.safetensors is missing"),
    "a missing manifest": (lambda c: (c / MANIFEST).unlink(), "manifest.json cannot be read: No such file or directory"),
    "a bit of the manifest's words": (lambda c: flip(c / MANIFEST, 20), "manifest.json is damaged"),
    "another step's checkpoint": (
        lambda c: shutil.copytree(c.with_name("step-00000002"), c, dirs_exist_ok=True),
        "manifest.json is damaged",
    ),
    "a pickle beside": (plant_beside, "extra.pt does not belong there"),
    "a pickle that the manifest tells of": (plant, "rank-00000.safetensors is no safetensors file"),
    "a pickle as manifest": (plant_as_manifest, "manifest.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    workshop: Workshop, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workshop.copy(tmp_path)
    newest = run / "checkpoints" / "step-00000004"
    act, words = DAMAGES[damage]
    act(newest)
    workshop.resume(run)
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert re.fullmatch(words, first.removeprefix("step-00000004 is broken: "))
    assert second == f"{run} goes on after step 2"
    assert losses(run) == losses(workshop.whole)
    assert names(run) == {"latest", "step-00000004", "step-00000004.broken", "step-00000006"}
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000006"
    assert not (run / "executed").exists()


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in read_metrics(run)[0]]


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_without_any_whole_checkpoint_all_are_named(workshop: Workshop, tmp_path: Path) -> None:
    run = workshop.copy(tmp_path)
    truncate(run / "checkpoints" / "step-00000004")
    flip(weights(run / "checkpoints" / "step-00000002"), -1)
    before = losses(run)
    with pytest.raises(
        BadInput, match=r"no checkpoint that is whole: step-00000004 is broken: .* bytes .*; step-00000002 is broken: "
    ):
        workshop.resume(run)
    assert losses(run) == before
    assert names(run) == {"latest", "step-00000002", "step-00000004"}


def test_what_a_killed_save_left_is_removed_and_a_run_without_checkpoints_begins_again(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workshop.copy(tmp_path)
    for step in SAVED:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.rename(folder.with_name(f"{folder.name}.partial"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    workshop.resume(run)
    assert f"{run} goes on after the beginning: no checkpoint was saved yet\n" in capsys.readouterr().err
    assert losses(run) == losses(workshop.whole)
    assert names(run) == {"latest", "step-00000004", "step-00000006"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", "eps", r"norm_eps is 1e-06 and was 1e-05 when .* was saved: it cannot change"),
        ("data", "other.txt", "the data holds other tokens than those that .* was trained on: give its own --data"),
    ],
)
def test_another_model_or_other_data_is_refused_whatever_it_is_called(
    workshop: Workshop, tmp_path: Path, name: str, value: str, words: str
) -> None:
    run, other = workshop.copy(tmp_path), tmp_path / value
    if name == "model":
        other.mkdir()
        (other / "config.json").write_text(json.dumps(MODEL | {"rms_norm_eps": 1e-6}))
        config, corpus = make_config(continue_run(run, {name: str(other)})), workshop.corpus
    else:
        other.write_text((workshop.folder / "text.txt").read_text().replace("squared", "cubed"))
        config = make_config(continue_run(run, {name: other}))
        corpus = build_corpus(other, ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(BadInput, match=words):
        Trainer(config, corpus, Place())


def test_the_same_data_elsewhere_is_the_same_data(workshop: Workshop, tmp_path: Path) -> None:
    run, moved = workshop.copy(tmp_path), tmp_path / "moved.txt"
    shutil.copy(workshop.folder / "text.txt", moved)
    corpus = build_corpus(moved, ByteTokenizer(), tmp_path / "cache")
    Trainer(make_config(continue_run(run, {"data": moved})), corpus, Place()).run()
    assert losses(run) == losses(workshop.whole)


def test_a_run_that_is_done_stays_as_it_is(workshop: Workshop, tmp_path: Path) -> None:
    run = shutil.copytree(workshop.whole, tmp_path / "run", symlinks=True)
    before = (run / "metrics.jsonl").read_text()
    workshop.resume(run)
    assert (run / "metrics.jsonl").read_text() == before
    assert names(run) == names(workshop.whole)


def test_what_is_saved_is_the_state_of_its_step_however_late_it_is_copied(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(copy: _Copy) -> None:
        time.sleep(0.3)
        take(copy)

    take = _Copy.take
    with monkeypatch.context() as patched:
        patched.setattr(_Copy, "take", late)
        workshop.train(workshop.settings("late", stop_after=3))
    run = workshop.folder / "late"
    stalls = [r["checkpoint_stall_s"] for r in map(json.loads, (run / "metrics.jsonl").open()) if "checkpoint_s" in r]
    assert stalls[0] > 0.1, "the update after step 2 had to wait"
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    workshop.resume(run)
    assert losses(run) == losses(workshop.whole)


# What stays.


def test_the_last_and_every_so_many_stay(workshop: Workshop) -> None:
    workshop.train(workshop.settings("kept", checkpoint_every=1, keep_last=2, keep_every=3))
    assert names(workshop.folder / "kept") == {"latest", "step-00000003", "step-00000005", "step-00000006"}


# A disk that is full.


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `limit` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workshop.copy(tmp_path)
    with largest_file(100_000):
        workshop.resume(run)
    assert "after step 6: the checkpoint failed and training goes on: " in capsys.readouterr().err
    assert losses(run) == losses(workshop.whole)
    assert names(run) == {"latest", "step-00000002", "step-00000004"}
    (told,) = [r for r in map(json.loads, (run / "metrics.jsonl").open()) if "checkpoint_error" in r]
    assert told["step"] == 5
    assert "File too large" in told["checkpoint_error"]


def train_with_little_room(rank: int, config: TrainConfig, corpus: Path, short_of_room: int) -> list[int]:
    """Train on this rank, one of them on a disk that is full. Returns the samples it has seen."""
    seen: list[int] = []

    class Watched(Corpus):
        def batch(self, indices: Any, seq_len: int) -> Any:
            seen.extend(indices.tolist())
            return super().batch(indices, seq_len)

    trainer = Trainer(config, Watched(corpus), Place(rank))
    with largest_file(100_000 if rank == short_of_room else resource.RLIM_INFINITY):
        trainer.run()
    return seen


def corpus_folder(workshop: Workshop) -> Path:
    return next((workshop.folder / "cache").glob("*/manifest.json")).parent


def test_a_full_disk_of_one_rank_is_told_by_all(world: World, workshop: Workshop) -> None:
    settings = workshop.settings("one", layout="tp=2,pp=2", stop_after=2)
    world.run(4, train_with_little_room, make_config(settings), corpus_folder(workshop), -1)
    run = workshop.folder / "one"
    world.run(4, train_with_little_room, make_config(continue_run(run, {})), corpus_folder(workshop), 2)
    assert [step for step, *_ in losses(run)] == list(range(STEPS))
    assert names(run) == {"latest", "step-00000002"}
    told = [r for r in map(json.loads, (run / "metrics.jsonl").open()) if "checkpoint_error" in r]
    assert [r["step"] for r in told] == [3, 5]
    assert all(r["checkpoint_error"].startswith("rank-00002: ") for r in told)
    assert all("File too large" in r["checkpoint_error"] for r in told)


def test_fewer_replicas_in_mid_epoch_see_every_sample_once(world: World, workshop: Workshop) -> None:
    samples = workshop.corpus.num_samples(32)
    steps = samples // 4
    settings = workshop.settings("data", layout="dp=4", steps=steps, held_out=0.0, stop_after=steps // 3)
    seen = world.run(4, train_with_little_room, make_config(settings), corpus_folder(workshop), -1)
    resumed = make_config(
        continue_run(workshop.folder / "data", {"layout": "dp=2,zero=2,mb=2", "checkpoint_every": 99})
    )
    seen += world.run(2, train_with_little_room, resumed, corpus_folder(workshop), -1)
    ordered = sorted(index for of_rank in seen for index in of_rank)
    assert len(ordered) == steps * 4 > samples - 4
    assert ordered == sorted(set(ordered))
