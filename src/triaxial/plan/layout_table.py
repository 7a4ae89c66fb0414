"""`LayoutTable`: many layouts as numpy columns, so that a million of them can be priced at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.layout import AXES, Layout, Recompute, ScheduleKind

Ints = NDArray[np.int64]

SCHEDULES: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
ORDERS: tuple[str, ...] = tuple("-".join(order) for order in permutations(AXES))


@dataclass(frozen=True)
class LayoutTable:
    """Columns of equal length, one row a layout. Text fields are positions in `SCHEDULES`, `RECOMPUTES`, `ORDERS`."""

    tp: Ints
    pp: Ints
    dp: Ints
    cp: Ints
    ep: Ints
    vpp: Ints
    mb: Ints
    schedule: Ints
    zero: Ints
    shard: Ints
    """As in `Layout`: 0 is all data-parallel ranks."""
    sp: Ints
    recompute: Ints
    order: Ints
    cuts: tuple[tuple[int, ...], ...] = ((),)
    """Given cuts; all rows share the only entry, or each has its own."""

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def shard_size(self) -> Ints:
        """Data-parallel ranks that ZeRO shards over; 1 without ZeRO."""
        return np.where(self.zero > 0, np.where(self.shard > 0, self.shard, self.dp), 1)

    @property
    def state_shards(self) -> Ints:
        """Ranks over which ZeRO cuts one copy of the model's state: cp ranks hold the same parameters as dp ranks."""
        return np.where(self.zero > 0, self.shard_size * self.cp, 1)

    @property
    def expert_folds(self) -> Ints:
        """Tensor-parallel ranks that hold different experts: more than 1 where ep reaches beyond dp and cp (parallel
        folding, arXiv 2504.14960)."""
        return np.maximum(self.ep // (self.dp * self.cp), 1)

    def micro_batches(self, global_batch: int) -> Ints:
        """Micro-batches that each pipeline runs for one step; rows must divide the batch."""
        result: Ints = global_batch // (self.dp * self.mb)
        return result

    def columns(self) -> dict[str, Ints]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cuts"}

    def take(self, rows: NDArray[Any]) -> LayoutTable:
        """The rows at these positions, or where this mask is true."""
        cuts = self.cuts if len(self.cuts) == 1 else tuple(self.cuts[i] for i in np.arange(len(self))[rows])
        return LayoutTable(**{name: column[rows] for name, column in self.columns().items()}, cuts=cuts)

    def cut(self, row: int) -> tuple[int, ...]:
        return self.cuts[0 if len(self.cuts) == 1 else row]

    def layout(self, row: int) -> Layout:
        """One row as a `Layout`."""
        values: dict[str, Any] = {name: int(column[row]) for name, column in self.columns().items()}
        values.update(
            schedule=SCHEDULES[values["schedule"]],
            recompute=RECOMPUTES[values["recompute"]],
            order=ORDERS[values["order"]],
            sp=bool(values["sp"]),
            cut=self.cut(row),
        )
        return Layout(**values)


def layout_table(layouts: Sequence[Layout]) -> LayoutTable:
    """Layouts as columns."""
    names = [f.name for f in fields(LayoutTable) if f.name != "cuts"]
    codes: dict[str, tuple[str, ...]] = {"schedule": SCHEDULES, "recompute": RECOMPUTES, "order": ORDERS}
    columns = {
        name: np.array(
            [codes[name].index(getattr(x, name)) if name in codes else int(getattr(x, name)) for x in layouts],
            dtype=np.int64,
        )
        for name in names
    }
    cuts = tuple(x.cut for x in layouts)
    return LayoutTable(**columns, cuts=cuts if any(cuts) else ((),))


def distinct(*columns: Ints) -> tuple[Ints, Ints]:
    """Distinct rows of small-integer columns: the position of each one's first row, and which one each row is."""
    key = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        low, high = int(column.min()), int(column.max())
        key = key * (high - low + 1) + (column - low)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)
