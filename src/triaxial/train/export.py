"""A run's weights as a Hugging Face model folder: config, generation settings, tokenizer, sharded safetensors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from triaxial import BadInput
from triaxial.files import require_free
from triaxial.model.spec import load_model_spec, read_description
from triaxial.model.weights import DTYPES, Piece, Source, global_tensors
from triaxial.train.checkpoint.folder import Broken, check_file, checkpoints_of, folder_of, steps_of
from triaxial.train.checkpoint.load import Stored, check_job, open_newest
from triaxial.train.description import FOLDER, config_json

SHARD_BYTES = 5_000_000_000
"""Of one file at most, unless a tensor alone is larger: the Hugging Face libraries' own limit."""

_READ_ELEMENTS = 16 << 20
"""Of a tensor that are read and converted at a time."""

Progress = Callable[[int, int], None]
"""Is told how many tensors are done, and of how many."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote; `bytes` are those of the tensors."""

    tensors: int
    files: int
    bytes: int
    dtype: str


def open_checkpoint(run: Path, step: int | None = None) -> tuple[Stored, list[str]]:
    """The weights of the newest whole checkpoint, or that after `step` steps, and what is wrong with newer ones.

    Raises:
        BadInput: no such checkpoint, it is damaged, or the folder is no run's.
    """
    stored, notes = open_newest(run) if step is None else (_open_step(run, step), [])
    if not (run / FOLDER / "config.json").is_file():
        raise BadInput(f"{run} is no run's folder: it holds no {FOLDER}/config.json")
    described = load_model_spec(run / FOLDER).model_dump(mode="json", exclude={"name"})
    check_job(stored.manifest.job, {"model": described}, run)
    return stored, notes


def _open_step(run: Path, step: int) -> Stored:
    root = checkpoints_of(run)
    if step not in (there := steps_of(root)):
        has = f"only {', '.join(map(str, there))}" if there else "none at all"
        raise BadInput(f"{run} holds no checkpoint after step {step}, {has}")
    try:
        stored = Stored(folder_of(root, step))
        for name, entry in stored.manifest.files.items():
            check_file(stored.folder / name, entry)
    except Broken as error:
        raise BadInput(f"{folder_of(root, step)}: {error}") from None
    return stored


def export_weights(
    description: Path,
    source: Source,
    folder: Path,
    dtype: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write the model that `description`, a folder as `keep_description` makes it, tells of, with weights from `source`.

    `folder` appears when it is complete. Memory is one file's tensors, in the type that is written.

    Raises:
        BadInput: `folder` holds something or cannot be written, an unknown type, or what `source` raises.
    """
    require_free(folder, "another DIR")
    config = read_description(description)
    dtype = dtype or str(config["dtype"])
    if dtype not in DTYPES.values():
        raise BadInput(f"dtype {dtype!r} is not one of {', '.join(DTYPES.values())}")
    with _appearing(folder) as partial:
        for path in description.iterdir():
            shutil.copyfile(path, partial / path.name)
        (partial / "config.json").write_text(config_json(config, dtype))
        tensors = global_tensors(load_model_spec(description))
        files, size = _write_shards(partial, tensors, source, getattr(torch, dtype), shard_bytes, progress)
    return Exported(len(tensors), files, size, dtype)


def _write_shards(
    folder: Path, tensors: list[Piece], source: Source, dtype: torch.dtype, shard_bytes: int, progress: Progress
) -> tuple[int, int]:
    """Write the tensors and, if there are several files, their index. Returns the files and the tensors' bytes."""
    by_name = {piece.name: piece for piece in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda piece: math.prod(piece.shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        held = {}
        for name in names:
            held[name] = _read(by_name[name], source, dtype)
            done += 1
            progress(done, len(tensors))
        save_file(held, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes files that only their owner reads
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(split.filename_to_tensors), int(split.metadata["total_size"])


def _read(piece: Piece, source: Source, dtype: torch.dtype) -> Tensor:
    """A whole tensor, in pieces, so that what is held in the type it is stored in stays small."""
    whole = torch.empty(piece.shape, dtype=dtype)
    rows = max(1, _READ_ELEMENTS * piece.shape[0] // math.prod(piece.shape))
    for start in range(0, piece.shape[0], rows):
        part = replace(piece, dim=0, start=start, stop=min(start + rows, piece.shape[0]))
        whole[part.start : part.stop].copy_(source(part))
    return whole


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when it is complete, and is gone if it never is."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
