"""What each pipeline rank holds: blocks by a balanced cut, micro-batches in flight by the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import ScheduleKind
from triaxial.plan.layout_table import SCHEDULES, LayoutTable, distinct
from triaxial.plan.pipeline.cut import placed_cut
from triaxial.plan.pipeline.generators import stage_placement

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Loads:
    """What ranks hold. Arrays of one shape: [ranks], or [candidates, layouts] once chosen by `heaviest_ranks`."""

    dense_layers: Floats
    """Decoder layers without experts, over all virtual stages of the rank."""
    expert_layers: Floats
    """Decoder layers with experts."""
    embedding: Floats
    """1 where the token embedding is."""
    head: Floats
    """1 where the output projection is."""
    in_flight: Floats
    """Micro-batches whose activations are held at the peak; a virtual stage counts 1/vpp."""

    def take(self, layouts: NDArray[np.int64]) -> Loads:
        """The candidates of these layouts."""
        return Loads(*(field[:, layouts] for field in vars(self).values()))

    def replaced(self, layouts: NDArray[np.int64], others: Loads) -> Loads:
        """The same, but for these layouts."""
        rows, new = self.rows(), others.rows()
        more = max(0, new.shape[1] - rows.shape[1])
        rows = np.pad(rows, ((0, 0), (0, more), (0, 0)))
        rows[:, :, layouts] = 0
        rows[:, : new.shape[1], layouts] = new
        return Loads(*rows)

    def times(self, share: Floats) -> Loads:
        """Each part of it times a share, one per layout."""
        return Loads(*(field * share for field in vars(self).values()))

    def rows(self) -> Floats:
        return np.stack([self.dense_layers, self.expert_layers, self.embedding, self.head, self.in_flight])


def stage_cut(model: ModelSpec, seq_len: int, placement: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks (embedding, layers, head) of each virtual stage, ranks balanced by FLOP. Exact (`plan/pipeline/cut.py`).

    `placement` is the rank of each virtual stage.
    """
    head = model.vocab * model.hidden
    layer = (model.matmul_parameters - head) / model.num_layers + model.attention_width * seq_len
    # the embedding is a look-up
    return _cut(model.num_layers, 0.0, head / layer, placement)


def cut_around(num_layers: int, embedding: int, head: int, placement: tuple[int, ...]) -> tuple[int, ...]:
    """The same, balanced by what embedding and head cost in per cent of an average rank's layers."""
    rank = num_layers / (max(placement) + 1)
    return _cut(num_layers, embedding / 100 * rank, head / 100 * rank, placement)


@lru_cache(maxsize=16384)
def _cut(num_layers: int, embedding: float, head: float, placement: tuple[int, ...]) -> tuple[int, ...]:
    # even a free embedding makes its stage the fuller one of equals
    return placed_cut(num_layers, max(embedding, 0.01), head, placement)


def in_flight_limit(schedule: ScheduleKind, pp: int, vpp: int) -> Floats:
    """Micro-batches whose activations each rank holds at its peak, if the step has that many.

    Sources: 1F1B and interleaved, arXiv 2104.04473, section 2.2, and arXiv 2205.05198, section 4.2.3
    (L (1 + (p-1)/(p v)) layers on the first rank); ZB-H1 p and ZB-H2 2p - 1 on every rank, arXiv 2401.10241,
    table 1; ZB-V p, section 6.
    """
    rank = np.arange(pp, dtype=float)
    if schedule == "gpipe":
        return np.full(pp, np.inf)
    if schedule in ("zb-h1", "zb-v"):
        return np.full(pp, float(pp))
    if schedule == "zb-h2":
        return np.full(pp, 2.0 * pp - 1)
    if schedule == "interleaved" and pp > 1:
        return ((vpp - 1) * pp + 2 * (pp - rank - 1) + 1) / vpp
    return pp - rank


def rank_loads(cut: tuple[int, ...], pp: int, schedule: ScheduleKind, first_dense: int) -> Loads:
    """Add up what the virtual stages of each rank hold.

    Args:
        cut: blocks of each virtual stage, embedding and head included.
        pp: pipeline ranks.
        schedule: places the stages (`stage_placement`) and says how many micro-batches are in flight.
        first_dense: how many of the first layers have no experts.
    """
    stages = len(cut)
    layers = np.array(cut, dtype=float)
    layers[0] -= 1
    layers[-1] -= 1
    before = np.concatenate(([0.0], np.cumsum(layers)[:-1]))
    dense = np.clip(first_dense - before, 0, layers)
    index = np.arange(stages)
    rank = np.array(stage_placement(schedule, pp, stages // pp))
    total = np.zeros((4, pp))
    for row, values in enumerate((dense, layers - dense, index == 0, index == stages - 1)):
        np.add.at(total[row], rank, values)
    dense_layers, expert_layers, embedding, head = total
    return Loads(dense_layers, expert_layers, embedding, head, in_flight_limit(schedule, pp, stages // pp))


def heaviest_ranks(
    model: ModelSpec,
    seq_len: int,
    table: LayoutTable,
    micro_batches: NDArray[np.int64],
    ends: NDArray[np.int64] | None = None,
) -> Loads:
    """The ranks that can be the slowest or the fullest, for every layout: [candidates, layouts].

    A rank is left out when another holds at least as much of everything. Missing candidates are all zero.

    Args:
        ends: what embedding and head cost in per cent of an average rank's layers, [end, layout], for layouts without a
            cut of their own to be cut by; None is by FLOP.
    """
    cut_ids = np.arange(len(table)) if len(table.cuts) > 1 else np.zeros(len(table), dtype=np.int64)
    first, which = distinct(table.pp, table.vpp, table.schedule, cut_ids, *(() if ends is None else ends))
    fronts = []
    for row in first:
        pp, vpp, schedule = int(table.pp[row]), int(table.vpp[row]), SCHEDULES[table.schedule[row]]
        placement = stage_placement(schedule, pp, vpp)
        if ends is None:
            balanced = stage_cut(model, seq_len, placement)
        else:
            embedding, head = ends[:, row].tolist()
            balanced = cut_around(model.num_layers, embedding, head, placement)
        cut = table.cut(row) or balanced
        fronts.append(_front(cut, pp, schedule, model.num_dense_layers))
    padded = np.zeros((len(fronts), 5, max(front.shape[1] for front in fronts)))  # [shape, field, rank]
    for shape, front in zip(padded, fronts):
        shape[:, : front.shape[1]] = front
    dense_layers, expert_layers, embedding, head, limit = padded.transpose(1, 2, 0)[:, :, which]
    return Loads(dense_layers, expert_layers, embedding, head, np.minimum(limit, micro_batches))


@lru_cache(maxsize=65536)
def _front(cut: tuple[int, ...], pp: int, schedule: ScheduleKind, first_dense: int) -> Floats:
    return _undominated(rank_loads(cut, pp, schedule, first_dense).rows())


def _undominated(rows: Floats) -> Floats:
    """Columns of [field, rank] that no other column matches or exceeds in every field; equal ones are kept once."""
    columns = np.unique(rows, axis=1)
    covers = np.all(columns[:, :, None] >= columns[:, None, :], axis=0)  # [by, rank]
    covers &= ~np.eye(len(covers), dtype=bool)
    return columns[:, ~covers.any(axis=0)]
