"""What files of measurements hold, by their columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from triaxial import BadInput
from triaxial.plan.validation.serving_logs import LOG_COLUMNS
from triaxial.plan.validation.serving_points import LOOP_COLUMNS, STATIC_COLUMNS, read_table

Kind = Literal["training steps", "serving points", "server logs"]


def kind_of(files: Sequence[Path]) -> Kind:
    """What all the files hold; no files: training steps.

    Raises:
        BadInput: a file that cannot be read, or files of different kinds.
    """
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {file}" for kind, file in kinds.items())
        raise BadInput(f"validate one kind of measurement at a time, not {found}")
    return next(iter(kinds), "training steps")


def _kind(file: Path) -> Kind:
    columns = set().union(*read_table(file)[:1])
    if columns.issuperset(LOG_COLUMNS):
        return "server logs"
    if columns.issuperset(STATIC_COLUMNS) or columns.issuperset(LOOP_COLUMNS):
        return "serving points"
    return "training steps"
