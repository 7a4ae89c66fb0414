"""kill -9 while training, again and again: does the run come out as if nothing had happened?

    python bench/kills.py [--kills 50] [--layout dp=2,zero=2] [--seed 0]

One run is trained twice: once without interruption, and once while a random rank, the launcher, or all of them are
killed at random moments (while loading, training and saving) and the run is resumed. After every kill each checkpoint
that is there must be whole, and none that was there may be gone before newer ones are. In the end losses, gradient
norms and validation losses must be bitwise those of the uninterrupted run, every step once.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from triaxial.train.checkpoint.folder import Broken, check_file, checkpoints_of, folder_of, read_manifest, steps_of

JOB = ("--seq-len", "32", "--global-batch", "4", "--warmup-steps", "20", "--eval-every", "50")
SAVING = ("--checkpoint-every", "2", "--keep-last", "2")
STEPS_A_KILL = 12
WHILE_LOADING = 0.2
"""Part of the kills that may come before training has begun; the others come within a second after it."""
VICTIMS = ("a rank", "the launcher", "all")
START_LIMIT_S, END_LIMIT_S = 300, 60


@dataclass(frozen=True)
class Kill:
    """One kill -9 and what it cost."""

    victim: str
    at: str
    """What the run was at: loading, or a step."""
    lost: int
    """Steps that were done and are done again."""


class Job:
    """One run of the training command after the other, in the same folder."""

    def __init__(self, folder: Path, data: Path, layout: str, steps: int) -> None:
        self.run, self._data, self._layout, self._steps = folder, data, layout, steps

    def start(self) -> subprocess.Popen[bytes]:
        """Resume the run, or begin it if it has left nothing to resume."""
        if (self.run / "settings.json").exists():
            what = ["--resume", str(self.run)]
        else:
            what = ["tiny-byte", "--data", str(self._data), "--layout", self._layout, "--steps", str(self._steps)]
            what += [*JOB, *SAVING, "--out", str(self.run)]
        return subprocess.Popen(
            [sys.executable, "-m", "triaxial", "train", *what],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self) -> None:
        process = self.start()
        _, told = process.communicate()
        if process.returncode:
            raise SystemExit(f"the run failed: {told.decode()}")

    def records(self) -> list[dict[str, float]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def steps_done(self) -> int:
        return max((int(r["step"]) + 1 for r in self.records() if "loss" in r), default=0)

    def curve(self) -> list[tuple[float, ...]]:
        """What must not depend on interruptions."""
        steps = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in self.records() if "loss" in r]
        return [*steps, *((r["step"], r["eval_loss"]) for r in self.records() if "eval_loss" in r)]

    def newest_checkpoint(self) -> int:
        """Its step, 0 if there is none.

        Raises:
            Broken: one that is there is not whole.
        """
        root = checkpoints_of(self.run)
        for step in steps_of(root):
            place = folder_of(root, step)
            for name, entry in read_manifest(place).files.items():
                check_file(place / name, entry)
        return max(steps_of(root), default=0)


def kill_once(job: Job, chance: random.Random) -> Kill | None:
    """Start or resume the run and kill it; None if it was done before that."""
    before, newest = job.steps_done(), job.newest_checkpoint()
    process = job.start()
    try:
        if chance.random() < WHILE_LOADING:
            time.sleep(chance.uniform(0.5, 5))
        else:
            _wait_for_steps(job, process, newest)
            time.sleep(chance.uniform(0, 1))
        if process.poll() is not None:
            return None
        ranks = psutil.Process(process.pid).children()
        victim = chance.choice(VICTIMS) if ranks else "the launcher"
        chosen = {"a rank": [chance.choice(ranks)] if ranks else [], "the launcher": [], "all": ranks}[victim]
        for rank in chosen:
            _kill(rank)
        if victim != "a rank":
            process.kill()
        process.communicate(timeout=END_LIMIT_S)
        _, alive = psutil.wait_procs(ranks, timeout=END_LIMIT_S)
        if alive:
            raise SystemExit(f"left behind: {alive}")
    finally:
        process.kill()
    done, saved = job.steps_done(), job.newest_checkpoint()
    if saved < newest:
        raise SystemExit(f"the checkpoint of step {newest} is lost")
    trained = done != before or saved != newest
    return Kill(victim, f"step {done}" if trained else "loading", max(0, done - saved) if trained else 0)


def _wait_for_steps(job: Job, process: subprocess.Popen[bytes], resumed: int) -> None:
    """Until the run has done a step after the one it is resumed from, or has ended."""
    path, deadline = job.run / "metrics.jsonl", time.monotonic() + START_LIMIT_S
    mark = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_mtime_ns > mark and job.steps_done() > resumed:
            return
        time.sleep(0.02)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@click.command()
@click.option("--kills", "wanted", default=50, show_default=True)
@click.option("--layout", default="dp=2,zero=2", show_default=True)
@click.option("--seed", default=0, show_default=True, help="of victims and moments")
def main(wanted: int, layout: str, seed: int) -> None:
    """kill -9 while training, again and again."""
    console, chance = Console(width=100, highlight=False), random.Random(seed)
    steps, kills = STEPS_A_KILL * wanted, []
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        data = Path(folder) / "squares.txt"
        data.write_text("\n".join(f"{i} squared is {i * i}." for i in range(20000)))
        whole, killed = (Job(Path(folder) / name, data, layout, steps) for name in ("whole", "killed"))
        task = bar.add_task("the uninterrupted run", total=None)
        whole.finish()
        bar.update(task, description="kills", total=wanted)
        try:
            while len(kills) < wanted and (kill := kill_once(killed, chance)):
                kills.append(kill)
                bar.update(task, completed=len(kills))
            bar.update(task, description="the rest of the run")
            killed.finish()
            killed.newest_checkpoint()
        except Broken as error:
            raise SystemExit(f"a checkpoint is not whole: {error}") from None
        same = whole.curve() == killed.curve()
    console.print(table(kills, f"{len(kills)} kills of a run of {steps} steps, {layout}"))
    console.print(f"loss curve bitwise that of the uninterrupted run, each step once: {'yes' if same else 'NO'}")
    sys.exit(0 if same else 1)


def table(kills: list[Kill], title: str) -> Table:
    table = Table(title=title)
    for column in ("killed", "kills", "of them while loading", "steps lost: mean", "most"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    counts = Counter(kill.victim for kill in kills)
    for victim in VICTIMS:
        lost = [kill.lost for kill in kills if kill.victim == victim] or [0]
        loading = sum(kill.victim == victim and kill.at == "loading" for kill in kills)
        table.add_row(victim, str(counts[victim]), str(loading), f"{sum(lost) / len(lost):.1f}", str(max(lost)))
    return table


if __name__ == "__main__":
    main()
