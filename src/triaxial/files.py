"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
from pathlib import Path

from triaxial import BadInput


def require_free(folder: Path, instead: str) -> None:
    """Refuse a folder that holds something or cannot be made.

    Raises:
        BadInput: asks to choose `instead`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not empty: choose {instead}")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"cannot write to {existing}: choose {instead}")


def require_writable(path: Path) -> None:
    """Refuse a file that `write_atomically` could not write, before the work for it is done.

    Raises:
        BadInput: its folder is missing or cannot be written to, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInput(f"cannot write {path}: name a file in a folder that exists")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it into place.

    Raises:
        BadInput: the folder is missing or cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
