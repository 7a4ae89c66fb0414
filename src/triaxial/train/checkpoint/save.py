"""Saving while training goes on: a copy of this rank's state, taken and written by a thread.

The copy is taken while the next step's forward and backward passes run, and must be complete only when the optimizer
is about to change the state. Ranks agree through the checkpoint's folder, which they must share: each leaves a note
beside its file when that is on the disk, and rank 0 publishes the checkpoint when every note is there.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from triaxial import BadInput
from triaxial.files import write_atomically
from triaxial.parallel.data import Unit
from triaxial.parallel.mesh import Mesh
from triaxial.train.checkpoint import folder
from triaxial.train.checkpoint.boxes import to_text
from triaxial.train.checkpoint.folder import FileEntry, Manifest
from triaxial.train.checkpoint.state import KINDS, TrainingState, own_parts, own_portion

_POLL_S = 0.02
_ABANDON_S = 5.0
"""That a writer has to end in when the run has failed."""


@dataclass(frozen=True)
class Policy:
    """Which checkpoints stay, and how long rank 0 waits for the other ranks' files."""

    keep_last: int = 2
    keep_every: int | None = None
    """Those whose step is a multiple of this stay for ever."""
    timeout_s: float = 600.0


@dataclass
class Save:
    """One checkpoint on its way to the disk."""

    step: int
    stall_s: float = 0.0
    """That training has waited for it."""
    seconds: float = 0.0
    """From its beginning until it was published."""
    bytes: int = 0
    error: str | None = None
    """Why there is no such checkpoint."""
    copied: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Saves one rank's part of checkpoints; a context manager that waits for the last one unless the run has failed."""

    def __init__(self, run: Path, state: TrainingState, mesh: Mesh, job: dict[str, Any], policy: Policy) -> None:
        self._root, self._metrics = folder.checkpoints_of(run), run / "metrics.jsonl"
        self._mesh, self._job, self._policy = mesh, job, policy
        self._copy = _Copy(state)
        self._thread: threading.Thread | None = None
        self._saves: list[Save] = []
        self._abandoned = threading.Event()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandoned.set()
            if self._thread is not None:
                self._thread.join(_ABANDON_S)
            return
        self.finish()
        self._mesh.world.all_gather(torch.zeros(1, device=self._mesh.device))  # no rank writes any more
        if self._mesh.rank == 0:
            folder.remove_partial(self._root)

    def start(self, step: int) -> None:
        """Begin to save the state after `step` optimizer steps, on every rank; waits for the save before, if it must."""
        began = time.perf_counter()
        self.finish()
        save = Save(step)
        self._saves.append(save)
        self._thread = threading.Thread(target=self._run, args=(save, began), daemon=True)
        self._thread.start()
        save.stall_s = time.perf_counter() - began

    def before_update(self) -> None:
        """The optimizer is about to change the state."""
        if self._saves and not self._saves[-1].copied.is_set():
            began = time.perf_counter()
            self._saves[-1].copied.wait()
            self._saves[-1].stall_s += time.perf_counter() - began

    def finish(self) -> None:
        """The save in progress, if any, has succeeded or failed when this returns."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def completed(self) -> list[Save]:
        """Saves that have ended since the last call; rank 0's tell how the checkpoint fared."""
        running = self._thread is not None and self._thread.is_alive()
        ended = self._saves[:-1] if running else self._saves
        self._saves = self._saves[len(ended) :]
        return ended

    # In the thread.

    def _run(self, save: Save, began: float) -> None:
        try:
            self._copy.take()
            save.copied.set()
            self._write(save.step)
            if self._mesh.rank == 0:
                save.bytes = self._publish(save.step)
                folder.remove_old(self._root, self._policy.keep_last, self._policy.keep_every)
        except Exception as error:  # whatever it is, training goes on
            save.error = _words(error)
            self._give_up(save)
        finally:
            save.copied.set()
            save.seconds = time.perf_counter() - began

    def _write(self, step: int) -> None:
        """Write this rank's file and, when it is on the disk, the note about it."""
        partial = folder.partial_of(self._root, step)
        if self._mesh.rank == 0:
            folder.remove_partial(self._root, before=step)
        partial.mkdir(parents=True, exist_ok=True)
        path = partial / _file_of(self._mesh.rank)
        save_file(self._copy.tensors(), path)
        with ThreadPoolExecutor(1) as beside:
            synced = beside.submit(folder.sync, path)
            entry = FileEntry(bytes=path.stat().st_size, crc32=folder.crc32_of(path), parts=self._copy.names())
            synced.result()
        write_atomically(_note(partial, self._mesh.rank), entry.model_dump_json())

    def _publish(self, step: int) -> int:
        """Wait for every rank's note, then make the checkpoint appear. Returns its bytes."""
        partial, ranks = folder.partial_of(self._root, step), range(self._mesh.world.size)
        for rank in ranks:
            self._await_note(partial, rank)
        files = {_file_of(rank): FileEntry.model_validate_json(_note(partial, rank).read_bytes()) for rank in ranks}
        for rank in ranks:
            _note(partial, rank).unlink()
        if self._metrics.exists():
            folder.sync(self._metrics)  # no step before the checkpoint is missing there
        folder.publish(self._root, Manifest(step=step, layout=str(self._mesh.layout), job=self._job, files=files))
        return sum(file.bytes for file in files.values())

    def _await_note(self, partial: Path, rank: int) -> None:
        deadline = time.monotonic() + self._policy.timeout_s
        while not _note(partial, rank).exists():
            if failures := sorted(partial.glob("*.failed")):
                raise _Failed(f"{failures[0].stem}: {failures[0].read_text() or 'it could not say why'}")
            if self._abandoned.wait(_POLL_S):
                raise _Failed("the run has ended")
            if time.monotonic() > deadline:
                raise _Failed(f"{_file_of(rank)} has not come: do all machines share {self._root}?")

    def _give_up(self, save: Save) -> None:
        """Remove what there is, or tell rank 0 that it should."""
        partial = folder.partial_of(self._root, save.step)
        if self._mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            return
        with contextlib.suppress(OSError):
            (partial / _file_of(self._mesh.rank)).unlink(missing_ok=True)  # makes room for the words
            (partial / f"rank-{self._mesh.rank:05d}.failed").write_text(save.error or "")


class _Failed(Exception):
    """Another rank's part has failed or did not come."""


class _Copy:
    """A second buffer for what this rank writes, kept from one save to the next."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._parts = {unit: parts for unit in state.units if (parts := list(own_parts(unit)))}
        self._buffers: dict[Unit, Tensor] = {}

    def take(self) -> None:
        for unit in self._parts:
            portion = own_portion(unit)
            sources = self._state.buffers(unit)
            if unit not in self._buffers:
                shape, pin = (len(KINDS), portion.stop - portion.start), unit.master.is_cuda
                self._buffers[unit] = torch.empty(shape, dtype=unit.master.dtype, pin_memory=pin)
            for copy, source in zip(self._buffers[unit], sources, strict=True):
                copy.copy_(source[portion])

    def tensors(self) -> dict[str, Tensor]:
        """The parts in the copy by the names they are stored under."""
        return {
            f"{kind}/{to_text(part.name, part.box)}": part.of(copy)
            for unit, parts in self._parts.items()
            for kind, copy in zip(KINDS, self._buffers[unit], strict=True)
            for part in parts
        }

    def names(self) -> list[str]:
        return [to_text(part.name, part.box) for parts in self._parts.values() for part in parts]


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _note(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, _Failed | SafetensorError | BadInput) else f"{type(error).__name__}: {error}"
