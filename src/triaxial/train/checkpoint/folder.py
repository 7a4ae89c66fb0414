"""`RUN/checkpoints`: one folder a checkpoint, which appears complete or not at all.

    checkpoints/
        latest -> step-00000200
        step-00000200/
            manifest.json            what the checkpoint is of, and each file's size, checksum and parts
            rank-00000.safetensors   parts of global tensors, one file for each rank that saved
        step-00000300.partial/       being written, or left by a run that was killed meanwhile
        step-00000100.broken/        set aside when a run was resumed

Everything is safetensors or JSON: nothing that is read can execute code.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

MANIFEST = "manifest.json"
LATEST = "latest"
_CHUNK_BYTES = 1 << 20


class Broken(Exception):
    """What is wrong with a checkpoint, naming the file."""


class FileEntry(BaseModel):
    """One safetensors file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    crc32: int
    parts: list[str]
    """`NAME[box]` of the parts in it. Each is stored once a kind of state, as `KIND/NAME[box]`."""


class Manifest(BaseModel):
    """What a checkpoint is of and what it consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    step: int
    """Optimizer steps done."""
    layout: str
    """Under which it was saved; reading it does not depend on this."""
    job: dict[str, Any]
    """What determines every later step: sizes, hyperparameters, seed, precision, the model and the data's digest."""
    files: dict[str, FileEntry]
    crc32: int = 0
    """Of this manifest, written with 0 here."""

    def sealed(self) -> Manifest:
        """With its checksum."""
        blank = self.model_copy(update={"crc32": 0})
        return blank.model_copy(update={"crc32": zlib.crc32(blank.model_dump_json().encode())})


def checkpoints_of(run: Path) -> Path:
    return run / "checkpoints"


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def partial_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}.partial"


def steps_of(root: Path) -> list[int]:
    """Steps of all checkpoints that look complete, ascending."""
    return _steps(root, "")


def _steps(root: Path, ending: str) -> list[int]:
    if not root.is_dir():
        return []
    pattern = re.compile(r"step-(\d{8,})" + re.escape(ending))
    return sorted(int(match[1]) for path in root.iterdir() if (match := pattern.fullmatch(path.name)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose folder holds the files that it names and no others.

    Raises:
        Broken: names the file that is damaged, missing or too many.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise Broken(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValidationError:
        raise Broken(f"{MANIFEST} is damaged") from None
    if manifest != manifest.sealed() or folder_of(folder.parent, manifest.step).name != folder.name:
        raise Broken(f"{MANIFEST} is damaged")
    there = {path.name for path in folder.iterdir()}
    known = manifest.files.keys() | {MANIFEST}
    if missing := known - there:
        raise Broken(f"{min(missing)} is missing")
    if strange := there - known:
        raise Broken(f"{min(strange)} does not belong there")
    return manifest


def check_file(path: Path, entry: FileEntry) -> None:
    """Read a file and compare it with what was written.

    Raises:
        Broken: truncated, altered or unreadable.
    """
    try:
        size, checksum = path.stat().st_size, crc32_of(path)
    except OSError as error:
        raise Broken(f"{path.name} cannot be read: {error.strerror}") from None
    if size != entry.bytes:
        raise Broken(f"{path.name} has {size} bytes instead of {entry.bytes}")
    if checksum != entry.crc32:
        raise Broken(f"{path.name} is damaged: its checksum differs")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError:
        raise Broken(f"{path.name} is no safetensors file") from None


def crc32_of(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def sync(path: Path) -> None:
    """A file's contents, or the entries of a folder, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(root: Path, manifest: Manifest) -> None:
    """Turn the partial folder, whose other files are complete and on the disk, into a checkpoint and point to it."""
    partial, folder = partial_of(root, manifest.step), folder_of(root, manifest.step)
    (partial / MANIFEST).write_text(manifest.sealed().model_dump_json(indent=1) + "\n")
    sync(partial / MANIFEST)
    sync(partial)
    partial.rename(folder)
    sync(root)
    pointer = root / f".{LATEST}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.name)
    pointer.replace(root / LATEST)
    sync(root)


def remove_old(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all checkpoints but the last ones and those whose step is a multiple of `keep_every`."""
    for step in steps_of(root)[:-keep_last]:
        if keep_every is None or step % keep_every:
            # Renamed first: what is half removed must not look complete.
            folder_of(root, step).rename(partial_of(root, step))
            shutil.rmtree(partial_of(root, step), ignore_errors=True)


def remove_partial(root: Path, before: int | None = None) -> None:
    """Remove what killed or failed saves have left: all of it, or that of steps before one."""
    for step in _steps(root, ".partial"):
        if before is None or step < before:
            shutil.rmtree(partial_of(root, step), ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Rename a broken checkpoint, so that it is in nobody's way."""
    aside = folder.with_name(f"{folder.name}.broken")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
