"""Saving and loading checkpoints against the disk and against one-process files of the same state, in one run.

    python bench/checkpoint.py [--repeats 3] [--folder DIR]

The state is that of the 34M-parameter model of `workload.py` in fp32: parameters and AdamW's two moments, 12 bytes a
parameter. "Disk" writes the checkpoint's own bytes from memory to one file and syncs it, and reads the checkpoint's own
files. Everything that is written is synced; everything is read with the page cache emptied of it, checksums verified
(Triaxial) or not (the others). Contestants take turns, so that a drift of the machine meets all; medians count.

Stall is what training waits for a save; its share is of the time the save takes from its beginning until it is on the
disk. Peak of a load is the most memory that a rank's shard and what loading needs beside it take, over the shard.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file

from triaxial.model.weights import initial_values
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Program, Shape, build_program
from triaxial.plan.layout import micro_batches, parse_layout
from triaxial.train.checkpoint.folder import checkpoints_of, folder_of
from triaxial.train.checkpoint.load import restore
from triaxial.train.checkpoint.save import Policy, Saver
from triaxial.train.checkpoint.state import TrainingState, parts_of
from triaxial.train.optimizer import Optimizer
from triaxial.train.step import make_micro_batches, training_step
from workload import HYPER, SEED, SPEC, batch

LAYOUTS = ("tp=1", "dp=2,zero=3", "tp=2,pp=2")
BATCH, SEQ_LEN = 2, 64
STEPS, SAVE_EVERY = 24, 8
"""Few tokens a step, and enough steps that no save has to wait for the one before."""
STATE_BYTES = 12 * SPEC.parameters


def build(layout_text: str, rank: int) -> tuple[Program, TrainingState]:
    layout = parse_layout(layout_text)
    program = build_program(
        SPEC, layout, shape=Shape(layout.mb, SEQ_LEN), num_micro_batches=micro_batches(layout, BATCH),
        precision=PRECISIONS["fp32"], rank=rank,
    )  # fmt: skip
    return program, TrainingState(program.units, Optimizer(program.units, HYPER))


def train_and_save(rank: int, layout: str, run: Path) -> list[tuple[float, float]]:
    """Train a few steps with saves between them. Returns each save's seconds and stall, but for the first's."""
    program, state = build(layout, rank)
    program.load(initial_values(SPEC, SEED))
    share = BATCH // program.layout.dp
    mine = slice(program.mesh.dp.index * share, (program.mesh.dp.index + 1) * share)
    with Saver(run, state, program.mesh, {}, Policy(keep_last=1)) as saver:
        for step in range(STEPS):
            ids, labels = (tokens[mine, :SEQ_LEN] for tokens in batch(step))
            parts = make_micro_batches(ids, labels, program.mesh, torch.float32)
            training_step(program, state.optimizer, parts, 1e-4, saver.before_update)
            if (step + 1) % SAVE_EVERY == 0:
                saver.start(step + 1)
        saver.finish()
        saves = saver.completed()
    assert not any(save.error for save in saves), saves
    return [(save.seconds, save.stall_s) for save in saves[1:]]


def save_only(rank: int, layout: str, run: Path) -> list[float]:
    """Save an idle state twice; the first save has still to make its buffers. Returns the second one's seconds."""
    program, state = build(layout, rank)
    program.load(initial_values(SPEC, SEED))
    with Saver(run, state, program.mesh, {}, Policy(keep_last=1)) as saver:
        for step in (1, 2):
            saver.start(step)
            saver.finish()
        saves = saver.completed()
    assert not any(save.error for save in saves), saves
    return [saves[-1].seconds]


def load_only(rank: int, layout: str, run: Path) -> tuple[float, float]:
    """Load twice. Returns the first load's seconds, and the second one's peak of memory over the shard."""
    program, state = build(layout, rank)
    for unit in state.units:
        for buffer in state.buffers(unit):
            buffer.fill_(1.0)  # all of it is resident, so that any more is what loading needs beside it
    began = time.perf_counter()
    restore(run, state, program.mesh, {})
    seconds = time.perf_counter() - began
    before = _memory("VmRSS")  # with all the code that loading runs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    restore(run, state, program.mesh, {})
    return seconds, 1 + (_memory("VmHWM") - before) / state.bytes


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_world(job: Callable[..., Any], layout: str, run: Path) -> list[Any]:
    """`job(rank, layout, run)` in a fresh process for each of the layout's ranks."""
    size = parse_layout(layout).world_size
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triaxial.train.checkpoint.save", "triaxial.train.step", "torch.distributed"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=context) as pool:
        store = str(Path(folder) / "store")
        return [f.result() for f in [pool.submit(_rank, rank, size, store, job, layout, run) for rank in range(size)]]


def _rank(rank: int, size: int, store: str, job: Callable[..., Any], layout: str, run: Path) -> Any:
    torch.set_num_threads(1)
    if size == 1:
        return job(rank, layout, run)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
    try:
        return job(rank, layout, run)
    finally:
        dist.destroy_process_group()


# The disk, and one process's files of the same state.


def whole_state() -> dict[str, torch.Tensor]:
    """A state of the same size in tensors of the model's shapes."""
    program, state = build("tp=1", 0)
    program.load(initial_values(SPEC, SEED))
    return {
        f"{part.name}.{kind}": part.of(buffer).clone()
        for unit in state.units
        for part in parts_of(unit)
        for kind, buffer in enumerate(state.buffers(unit))
    }


def synced(path: Path, write: Callable[[], None]) -> float:
    """Seconds to write a file and bring it to the disk."""
    began = time.perf_counter()
    write()
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return time.perf_counter() - began


def forget(*paths: Path) -> None:
    """Take files out of the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed_reading(paths: list[Path], read: Callable[[], Any]) -> float:
    forget(*paths)
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def read_plainly(paths: list[Path]) -> None:
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_plainly(path: Path, content: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), 8 << 20):
            file.write(content[start : start + (8 << 20)])


class Results:
    """Seconds by contestant, and peaks and stalls of Triaxial's layouts."""

    def __init__(self) -> None:
        self.writing: dict[str, list[float]] = {}
        self.reading: dict[str, list[float]] = {}
        self.peaks: dict[str, list[float]] = {}
        self.saves: dict[str, list[tuple[float, float]]] = {}


def one_round(folder: Path, state: dict[str, torch.Tensor], results: Results, advance: Callable[[], None]) -> None:
    """Every contestant once."""
    content = memoryview(np.random.default_rng(0).bytes(STATE_BYTES))
    plain, torch_file, tensors = (folder / name for name in ("plain", "state.pt", "state.safetensors"))
    for name, path, write, read in (
        ("disk", plain, lambda: write_plainly(plain, content), lambda: read_plainly([plain])),
        ("safetensors", tensors, lambda: save_file(state, tensors), lambda: _touch(load_file(tensors))),
        ("torch.save", torch_file, lambda: torch.save(state, torch_file), lambda: torch.load(torch_file)),
    ):
        results.writing.setdefault(name, []).append(synced(path, write))
        results.reading.setdefault(name, []).append(timed_reading([path], read))
        path.unlink()
        advance()
    for layout in LAYOUTS:
        run = folder / "run"
        results.writing.setdefault(f"Triaxial, {layout}", []).append(max(run_world(save_only, layout, run))[0])
        files = list(folder_of(checkpoints_of(run), 2).iterdir())
        results.reading.setdefault("disk, same files", []).append(timed_reading(files, partial(read_plainly, files)))
        for other in dict.fromkeys((layout, LAYOUTS[-1])):
            forget(*files)
            loads = run_world(load_only, other, run)
            name = f"Triaxial, {layout}" + (f" into {other}" if other != layout else "")
            results.reading.setdefault(name, []).append(max(seconds for seconds, _ in loads))
            results.peaks.setdefault(name, []).append(max(peak for _, peak in loads))
        shutil.rmtree(run)
        results.saves.setdefault(layout, []).extend(run_world(train_and_save, layout, run)[0])
        shutil.rmtree(run)
        advance()


def _touch(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors that are only mapped."""
    return [tensor.clone() for tensor in tensors.values()]


def print_tables(results: Results, console: Console) -> None:
    disk = {"write": statistics.median(results.writing["disk"]), "read": statistics.median(results.reading["disk"])}
    table = Table(title=f"{STATE_BYTES / 1e6:.0f} MB of state ({SPEC.parameters / 1e6:.1f}M parameters, fp32)")
    for column in ("", "save, MB/s", "of disk", "load, MB/s", "of disk", "peak of load / shard"):
        table.add_column(column, justify="left" if not column else "right")
    for name in dict.fromkeys((*results.writing, *results.reading)):
        row = [name]
        for kind, seconds in (("write", results.writing), ("read", results.reading)):
            if name in seconds:
                median = statistics.median(seconds[name])
                row += [f"{STATE_BYTES / 1e6 / median:.0f}", f"{disk[kind] / median:.2f}"]
            else:
                row += ["", ""]
        row.append(f"{max(results.peaks[name]):.2f}" if name in results.peaks else "")
        table.add_row(*row)
    console.print(table)
    table = Table(title="saves while training")
    for column in ("", "until on disk, s", "training waits, s", "share"):
        table.add_column(column, justify="left" if not column else "right")
    for layout, saves in results.saves.items():
        seconds, stall = (statistics.median(column) for column in zip(*saves, strict=True))
        table.add_row(f"Triaxial, {layout}", f"{seconds:.2f}", f"{stall:.4f}", f"{stall / seconds:.1%}")
    console.print(table)


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where to write; by default the temporary folder")
def main(repeats: int, folder: Path | None) -> None:
    """Checkpoints against the disk, torch.save and safetensors."""
    torch.set_num_threads(1)
    state, results = whole_state(), Results()
    with (
        tempfile.TemporaryDirectory(dir=folder) as here,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("saving and loading", total=repeats * (3 + len(LAYOUTS)))
        for _ in range(repeats):
            one_round(Path(here), state, results, lambda: bar.advance(task))
    print_tables(results, Console(width=110, highlight=False))


if __name__ == "__main__":
    main()
