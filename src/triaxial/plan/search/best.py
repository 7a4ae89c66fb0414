"""The best layouts of all: exact, by pricing families in the order of what none of their members can beat."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from triaxial import NoAnswer
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.placement import Placement, data_stride, place
from triaxial.plan.cost.practice import OURS
from triaxial.plan.layout_table import RECOMPUTES, LayoutTable, distinct
from triaxial.plan.search.cuts import block_seconds, cut_loads, with_cuts
from triaxial.plan.search.enumerate import count_members, families, members
from triaxial.plan.training.block_seconds import ModelSeconds, PricedBlocks, model_seconds, price_blocks
from triaxial.plan.training.constants import TRAINING
from triaxial.plan.training.price import Estimate, all_ranks, estimates, fits, memory_of, step_seconds
from triaxial.plan.training.zero_bubble_v import MOST_OPTIMISTIC, is_optimistic
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """The best layouts of a search."""

    best: tuple[Estimate, ...]
    """Fastest first; layouts that tie are ordered by the memory they need."""
    considered: int
    """Legal layouts, those excluded by their lower bound included."""
    priced: int
    """Layouts whose time was computed."""


@dataclass(frozen=True)
class Space:
    """The families that a search may choose from, priced as far as their members agree."""

    families: LayoutTable
    priced: PricedBlocks
    bounds: Floats
    """Seconds that no member of a family can beat."""
    least_bytes: Floats
    """Bytes that no member of a family can do without."""
    blocks: Floats
    """Seconds of each kind of block, [block, recompute, family]: members are cut by them (`cuts.py`)."""

    def where(self, families: NDArray[np.bool_]) -> Space:
        """The part of the space in which this holds."""
        rows = np.flatnonzero(families)
        placement = self.priced.placement.take(rows)
        return Space(
            self.families.take(rows),
            self.priced.for_layouts(rows, placement),
            self.bounds[rows],
            self.least_bytes[rows],
            self.blocks[:, :, rows],
        )


def search_space(model: ModelSpec, cluster: Cluster, training: Training) -> Space:
    """All families of layouts that are legal.

    Raises:
        NoAnswer: there are none.
    """
    every = families(model, cluster, training)
    if len(every) == 0:
        raise NoAnswer(
            f"no layout of {model.name} uses all {cluster.num_gpus} GPUs with global batch {training.global_batch}: "
            "choose a batch or a number of GPUs that share more divisors"
        )
    every, placement = _placed_differently(cluster, every)
    priced = price_blocks(model, training, OURS, every, placement)
    seconds = [model_seconds(priced, np.full(len(every), kind), OURS, TRAINING) for kind in range(len(RECOMPUTES))]
    blocks = np.stack([block_seconds(each) for each in seconds], axis=1)
    bounds = lower_bounds(model, training, every, seconds[RECOMPUTES.index("none")])
    return Space(every, priced, bounds, least_memory(model, training, every), blocks)


def search(
    model: ModelSpec,
    cluster: Cluster,
    training: Training,
    *,
    top: int = 5,
    within: float = 0.0,
    at_most: float = np.inf,
    space: Space | None = None,
) -> Found:
    """Find the fastest layouts that fit. Exact: a family is left out only if its lower bound exceeds what is found.

    Args:
        top: how many layouts to return at least.
        within: also return every layout that is slower than the fastest by at most this share.
        at_most: leave out layouts that take more seconds than this.
        space: what to choose from; None is everything legal.

    Raises:
        NoAnswer: nothing fits; the sentence says how much memory the smallest layout needs.
    """
    space = space or search_space(model, cluster, training)
    candidates, bounds = space.families, space.bounds
    promising = np.flatnonzero(fits(cluster, space.least_bytes))
    order = promising[np.argsort(bounds[promising], kind="stable")]
    tables: list[LayoutTable] = []
    steps, at_most_steps, peaks = np.zeros(0), np.zeros(0), np.zeros(0)
    num_priced, at = 0, 0
    smallest = float(space.least_bytes.min())
    while at < len(order):
        limit = min(at_most, _limit(at_most_steps, top, within))
        chosen = order[at : at + _families_at_once(at)]
        chosen = chosen[bounds[chosen] <= limit]
        if len(chosen) == 0:
            break
        at += len(chosen)
        table, origin = members(model, training, candidates.take(chosen))
        loads, _ = cut_loads(model, cluster, training, table, space.blocks[:, table.recompute, chosen[origin]])
        peak = memory_of(model, training, OURS, table, loads).on(cluster.device).peak
        smallest = float(peak.min()) if len(tables) == 0 else smallest
        rows = np.flatnonzero(fits(cluster, peak))
        if len(rows) == 0:
            continue
        table = table.take(rows)
        blocks = space.priced.for_layouts(chosen[origin[rows]], place(cluster, table))
        step = step_seconds(model, cluster, training, table, priced=blocks, loads=loads.take(rows)).step
        good = np.flatnonzero(step <= limit)
        tables.append(table.take(good))
        steps, peaks = np.concatenate([steps, step[good]]), np.concatenate([peaks, peak[rows][good]])
        at_most_steps = np.concatenate([at_most_steps, _longest(training, table.take(good), step[good])])
        num_priced += len(table)
    if len(steps) == 0:
        raise NoAnswer(
            f"{model.name} fits no layout on {cluster.name}: the smallest needs {smallest / 2**30:.0f} GiB per GPU, "
            f"{cluster.device.name} has {cluster.device.memory_bytes / 2**30:.0f} GiB"
        )
    ranked = np.lexsort((peaks, steps))
    count = max(top, int((steps <= at_most_steps.min() * (1 + within)).sum()) if within else 0)
    everything = _concatenate(tables).take(ranked)
    return Found(
        best=_exactly(model, cluster, training, everything, steps[ranked], count),
        considered=count_members(model, training, candidates),
        priced=num_priced,
    )


def _longest(training: Training, table: LayoutTable, step: Floats) -> Floats:
    """Seconds that steps cannot exceed when they are played."""
    inexact = is_optimistic(table.schedule, table.pp, table.micro_batches(training.global_batch))
    return np.asarray(step * np.where(inexact, MOST_OPTIMISTIC, 1.0))


def _exactly(
    model: ModelSpec, cluster: Cluster, training: Training, ranked: LayoutTable, steps: Floats, count: int
) -> tuple[Estimate, ...]:
    """The `count` fastest layouts with inexact closed forms played. `steps` are the closed forms, shortest first: none
    can be faster than its own."""
    tried = count
    while True:
        first = ranked.take(np.arange(min(tried, len(ranked))))
        found = estimates(model, cluster, training, with_cuts(model, cluster, training, first))
        found.sort(key=lambda e: e.step_time_s)
        if tried >= len(ranked) or found[count - 1].step_time_s <= steps[tried]:
            return tuple(found[:count])
        tried *= 2


def _placed_differently(cluster: Cluster, every: LayoutTable) -> tuple[LayoutTable, Placement]:
    """Families without those that another rank order of the same sizes puts on the same links."""
    placement = place(cluster, every)
    sizes = (every.tp, every.pp, every.dp, every.cp, every.ep, every.mb, every.sp)
    links = (placement.spans[span] for span in ("tp", "cp", "pp", "data", "ep"))
    # parts of the data axis lie alike too if all of it is in a node, or if they are equally many in one
    stride, node = data_stride(every), cluster.gpus_per_node
    inside = np.where(stride * every.dp * every.cp <= node, 0, np.minimum(stride, node))
    first = np.sort(distinct(*sizes, *links, inside)[0])
    return every.take(first), placement.take(first)


def lower_bounds(model: ModelSpec, training: Training, table: LayoutTable, seconds: ModelSeconds) -> Floats:
    """Seconds that no member of a family can beat: its operators and collectives without recomputation, shared
    evenly by the pipeline ranks, with no bubble, no transfers, no gradient reduction and no optimizer.

    Args:
        seconds: the families' blocks without recomputation.
    """
    whole = seconds.total_on_rank(all_ranks(model, len(table)))[0]
    bounds: Floats = whole / table.pp * table.micro_batches(training.global_batch)
    return bounds


def least_memory(model: ModelSpec, training: Training, table: LayoutTable) -> Floats:
    """Bytes that every member of a family needs on some GPU: an average rank's state, all of it sharded; without a
    pipeline, where the average rank is every rank, also its activations under full recomputation."""
    data = np.where(table.dp * table.cp > 1, 3, 0)
    leanest = replace(table, zero=data, recompute=np.full_like(table.recompute, RECOMPUTES.index("full")))
    share = all_ranks(model, len(table)).times(1 / table.pp)
    held = memory_of(model, training, OURS, leanest, replace(share, in_flight=np.ones_like(share.in_flight)))
    state = held.parameters + held.gradients + held.optimizer + held.reserve
    bounds: Floats = state + np.where(table.pp == 1, held.activations + held.logits, 0)
    return bounds


def _limit(steps: Floats, top: int, within: float) -> float:
    """Slower layouts are of no interest: as many as asked for are faster, and the fastest by more than asked for."""
    if len(steps) < top:
        return np.inf
    return max(float(np.partition(steps, top - 1)[top - 1]), float(steps.min()) * (1 + within))


def _families_at_once(done: int) -> int:
    """A few at first, to find a good limit early; then enough to keep numpy busy."""
    return 16 if done == 0 else 128


def _concatenate(tables: list[LayoutTable]) -> LayoutTable:
    names = tables[0].columns()
    return LayoutTable(
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in names}, cuts=((),)
    )
