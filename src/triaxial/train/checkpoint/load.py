"""Loading under any layout: every rank reads the parts of its own shard, whoever wrote them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from triaxial import BadInput
from triaxial.model.weights import DTYPES, Piece
from triaxial.parallel.mesh import Axis, Mesh
from triaxial.train.checkpoint import folder
from triaxial.train.checkpoint.boxes import Box, common, from_text, in_blocks, inside, to_text, volume
from triaxial.train.checkpoint.folder import Broken
from triaxial.train.checkpoint.state import KINDS, WEIGHTS, TrainingState, parts_of

_LEAST_MAPPED_BYTES = 2 << 20
_MAPPED_PART = 0.03
"""Of a shard. Pages of a file that have been read are this process's memory until the file is opened anew."""
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Restored:
    """Where training goes on, and what was found on the way there, in words."""

    step: int
    notes: list[str]


def restore(run: Path, state: TrainingState, mesh: Mesh, job: dict[str, Any]) -> Restored | None:
    """Fill the state from the newest checkpoint of `run` that is whole; None if none was ever saved.

    All ranks must call it. Newer ones, which are broken, are set aside, and what killed saves have left is removed.

    Raises:
        BadInput: there are checkpoints and none is whole, or they are of another job.
    """
    root = folder.checkpoints_of(run)
    step, broken = _newest_whole(root, mesh.world, mesh.device)
    stored = None if step is None else Stored(folder.folder_of(root, step), round(_MAPPED_PART * state.bytes))
    if stored:
        check_job(stored.manifest.job, job, run)
    if mesh.rank == 0:
        folder.remove_partial(root)
        for other in broken:
            folder.set_aside(folder.folder_of(root, other))
    if stored is None:
        return None
    for unit in state.units:
        unit.settle()
    try:
        for number, kind in enumerate(KINDS):  # in the order of the files
            for unit in state.units:
                for part in parts_of(unit):
                    stored.read(kind, part.name, part.box, part.of(state.buffers(unit)[number]))
        for unit in state.units:
            unit.restored()
    except (Broken, SafetensorError) as error:
        raise BadInput(f"{stored.folder}: {error}") from None
    state.optimizer.continue_from(stored.manifest.step)
    return Restored(stored.manifest.step, list(broken.values()))


def open_newest(run: Path) -> tuple[Stored, list[str]]:
    """The newest whole checkpoint of a run, for one process, and what is wrong with newer ones, in words.

    Raises:
        BadInput: there is none.
    """
    root = folder.checkpoints_of(run)
    step, broken = _newest_whole(root, Axis("world", (0,), 0), torch.device("cpu"))
    if step is None:
        raise BadInput(f"{run} holds no checkpoint")
    return Stored(folder.folder_of(root, step)), list(broken.values())


def check_job(saved: dict[str, Any], job: dict[str, Any], run: Path) -> None:
    """Raises BadInput where `job` would compute something else than the run that was saved."""
    now = json.loads(json.dumps(job))
    for name, value in saved.items():
        if now.get(name, value) == value:
            continue
        if name == "data":
            raise BadInput(f"the data holds other tokens than those that {run} was trained on: give its own --data")
        if name == "model":
            check_job(value, now[name], run)
        raise BadInput(f"{name} is {now[name]} and was {value} when {run} was saved: it cannot change")


def _newest_whole(root: Path, world: Axis, device: torch.device) -> tuple[int | None, dict[int, str]]:
    """Step of the newest whole checkpoint, as all ranks agree, and what is wrong with newer ones.

    Raises:
        BadInput: there are checkpoints and none is whole.
    """
    broken: dict[int, str] = {}
    while True:
        older = [step for step in folder.steps_of(root) if step < min(broken, default=step + 1)]
        step = _everyones(older[-1] if older else -1, world, device)[0]  # rank 0's word counts
        if step < 0 and broken:
            raise BadInput(f"{root} holds no checkpoint that is whole: {'; '.join(broken.values())}")
        if step < 0:
            return None, {}
        place = folder.folder_of(root, step)
        faulty = max(_everyones(_first_fault(place, world), world, device))
        if faulty < 0:
            return step, broken
        broken[step] = f"{place.name} is broken: {_fault(place, faulty)}"


def _first_fault(place: Path, world: Axis) -> int:
    """Number of the first broken file among those that this rank checks, the manifest being 0; -1 if there is none."""
    number = 0
    try:
        files = sorted(folder.read_manifest(place).files.items())
        for number in range(1 + world.index, 1 + len(files), world.size):
            folder.check_file(place / files[number - 1][0], files[number - 1][1])
    except Broken:
        return number
    return -1


def _fault(place: Path, number: int) -> str:
    """What is wrong with a file of a checkpoint, in words."""
    try:
        files = sorted(folder.read_manifest(place).files.items())
        if number:
            folder.check_file(place / files[number - 1][0], files[number - 1][1])
    except Broken as error:
        return str(error)
    return "another rank cannot read it"


def _everyones(number: int, world: Axis, device: torch.device) -> list[int]:
    mine = torch.tensor([number], dtype=torch.int64, device=device)
    return [int(n) for n in world.all_gather(mine).tolist()]


class Stored:
    """The tensors of a checkpoint, read box by box; as a `Source` it gives the weights."""

    def __init__(self, place: Path, mapped_bytes: int = 0) -> None:
        """Open a checkpoint; about `mapped_bytes` of it, if they are not too few, are in memory while it is read.

        Raises:
            Broken: the manifest is.
        """
        self._limit = max(mapped_bytes, _LEAST_MAPPED_BYTES)
        self.folder, self.manifest = place, folder.read_manifest(place)
        self._parts: dict[str, list[tuple[Box, str]]] = defaultdict(list)
        for file, entry in self.manifest.files.items():
            for text in entry.parts:
                name, box = from_text(text)
                self._parts[name].append((box, file))
        self._open: dict[str, Any] = {}
        self._mapped = 0

    def __call__(self, piece: Piece) -> Tensor:
        """The values of a piece of the weights, in the type that they are stored in."""
        whole = tuple((0, size) for size in piece.shape)
        box = (*whole[: piece.dim], (piece.start, piece.stop), *whole[piece.dim + 1 :])
        try:
            values = torch.empty(piece.local_shape, dtype=self._dtype_of(piece.name))
            self.read(WEIGHTS, piece.name, box, values)
        except (Broken, SafetensorError) as error:
            raise BadInput(f"{self.folder}: {error}") from None
        return values

    def _dtype_of(self, name: str) -> torch.dtype:
        if not self._parts[name]:
            raise Broken(f"{name} is not there")
        box, file = self._parts[name][0]
        dtype: torch.dtype = getattr(torch, DTYPES[self._slice(file, f"{WEIGHTS}/{to_text(name, box)}").get_dtype()])
        return dtype

    def read(self, kind: str, name: str, box: Box, into: Tensor) -> None:
        """Read a box of a tensor of one kind of state into a tensor of its shape.

        Raises:
            Broken: the checkpoint does not hold all of it, or in another type.
        """
        found = 0
        for stored, file in self._parts[name]:
            if (shared := common(box, stored)) is None:
                continue
            found += volume(shared)
            for block in in_blocks(shared, _BLOCK_ELEMENTS):
                values: Tensor = self._slice(file, f"{kind}/{to_text(name, stored)}")[inside(block, stored)]
                if values.dtype != into.dtype:
                    raise Broken(f"{file} holds {name} in {values.dtype}, not {into.dtype}")
                into[inside(block, box)].copy_(values)
                self._mapped += volume((block[0], *stored[1:])) * into.element_size()  # all of the rows
        if found != volume(box):
            raise Broken(f"{to_text(name, box)} is not there")

    def _slice(self, file: str, key: str) -> Any:
        if self._mapped > self._limit:
            self._open.clear()
            self._mapped = 0
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt").__enter__()
        return self._open[file].get_slice(key)
