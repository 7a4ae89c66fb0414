"""Every legal layout of a model on a cluster, in two steps: families that cut the work alike, then their members."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout_table import ORDERS, RECOMPUTES, SCHEDULES, Ints, LayoutTable
from triaxial.plan.workload import Training

ONE_F_ONE_B, INTERLEAVED = SCHEDULES.index("1f1b"), SCHEDULES.index("interleaved")
ZB_H1, ZB_H2, ZB_V = (SCHEDULES.index(kind) for kind in ("zb-h1", "zb-h2", "zb-v"))
PLACEMENTS = tuple(order for order in ORDERS if "cp-dp" in order)
"""Rank orders: dp and cp reduce gradients together, so the one always follows the other."""


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def families(model: ModelSpec, cluster: Cluster, training: Training) -> LayoutTable:
    """One layout for each way to cut and place the work: axis sizes, micro-batch, sequence parallelism, rank order.

    The layouts of a family run the same operators on the same links; `members` adds what they differ in.
    """
    rows = [
        (tp, pp, dp, cp, ep, 1, mb, ONE_F_ONE_B, 0, 0, sp, 0, order)
        for tp, cp, pp, dp in _axis_sizes(model, cluster, training)
        for ep in _expert_parallel(model, dp * cp)
        for mb in divisors(training.global_batch // dp)
        for sp in ((0, 1) if tp > 1 and training.seq_len % (tp * cp) == 0 else (0,))
        for order in _orders(tp > 1, cp * dp > 1, pp > 1)
    ]
    return LayoutTable(*np.array(rows, dtype=np.int64).reshape(-1, 13).T)


def members(model: ModelSpec, training: Training, family: LayoutTable) -> tuple[LayoutTable, Ints]:
    """All layouts of these families, and the family of each: schedule, virtual stages, ZeRO and recomputation.

    Not listed are those that another member is never worse than: GPipe (1F1B takes as long and holds less), and more
    virtual stages than reach a stage size.
    """
    options, sizes = [], []
    for pp, dp, cp, count in zip(
        family.pp.tolist(), family.dp.tolist(), family.cp.tolist(), family.micro_batches(training.global_batch).tolist()
    ):
        choices = _choices(model.num_layers + 2, pp, dp, cp, count % pp == 0)
        options.append(choices)
        sizes.append(choices.shape[1])
    vpp, schedule, zero, shard, recompute = np.concatenate(options, axis=1)
    origin = np.repeat(np.arange(len(family)), sizes)
    chosen = {"vpp": vpp, "schedule": schedule, "zero": zero, "shard": shard, "recompute": recompute}
    return LayoutTable(**{**family.take(origin).columns(), **chosen}, cuts=((),)), origin


def count_members(model: ModelSpec, training: Training, family: LayoutTable) -> int:
    """How many layouts `members` would list."""
    count = family.micro_batches(training.global_batch) % family.pp == 0
    keys, multiples = np.unique(np.stack([family.pp, family.dp, family.cp, count]), axis=1, return_counts=True)
    sizes = [_choices(model.num_layers + 2, *(int(x) for x in key[:3]), bool(key[3])).shape[1] for key in keys.T]
    return int(np.dot(sizes, multiples))


def _axis_sizes(model: ModelSpec, cluster: Cluster, training: Training) -> Iterator[tuple[int, int, int, int]]:
    """(tp, cp, pp, dp) that use every GPU and that heads, layers, sequence and batch allow."""
    gpus = cluster.num_gpus
    for tp in divisors(gpus):
        if not _tensor_parallel_fits(model, tp):
            continue
        for cp in divisors(gpus // tp):
            if cp > 1 and training.seq_len % (2 * cp):
                continue
            for pp in divisors(gpus // tp // cp):
                dp = gpus // tp // cp // pp
                if pp <= model.num_layers + 2 and training.global_batch % dp == 0:
                    yield tp, cp, pp, dp


def _tensor_parallel_fits(model: ModelSpec, tp: int) -> bool:
    whole = model.num_heads % tp == 0 and model.ffn % tp == 0
    if model.experts:
        whole = whole and model.experts.ffn % tp == 0
    return whole and (model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0)


def _expert_parallel(model: ModelSpec, data: int) -> list[int]:
    if model.experts is None:
        return [1]
    return [ep for ep in divisors(model.experts.count) if data % ep == 0]


@lru_cache(maxsize=65536)
def _choices(blocks: int, pp: int, dp: int, cp: int, interleaves: bool) -> Ints:
    """What the members of a family differ in, [column, member]: vpp, schedule, zero, shard, recompute."""
    rows = [
        (vpp, schedule, zero, shard, recompute)
        for vpp, schedule in _schedules(blocks, pp, interleaves)
        for zero, shard in _shardings(dp, cp)
        for recompute in range(len(RECOMPUTES))
    ]
    return np.array(rows, dtype=np.int64).T


def _schedules(blocks: int, pp: int, interleaves: bool) -> Iterator[tuple[int, int]]:
    """(vpp, schedule)"""
    yield 1, ONE_F_ONE_B
    if pp == 1:
        return
    yield from ((1, ZB_H1), (1, ZB_H2))
    if 2 * pp <= blocks:
        yield 2, ZB_V
    if interleaves:
        largest = [-(-blocks // (pp * vpp)) for vpp in range(1, blocks // pp + 1)]
        yield from (
            (vpp, INTERLEAVED) for vpp, (before, here) in enumerate(pairwise(largest), start=2) if here < before
        )


@lru_cache(maxsize=4096)
def _shardings(dp: int, cp: int) -> tuple[tuple[int, int], ...]:
    """(zero, shard)"""
    if dp * cp == 1:
        return ((0, 0),)
    parts = [0, *divisors(dp)[1:-1]]
    return ((0, 0), *((zero, shard) for zero in (1, 2, 3) for shard in parts))


@lru_cache
def _orders(tp: bool, data: bool, pp: bool) -> tuple[int, ...]:
    """Rank orders that place some axis differently; axes of one rank, which is what False says, have no place."""
    seen: dict[tuple[str, ...], int] = {}
    wide = {"tp": tp, "dp": data, "pp": pp}
    for order in PLACEMENTS:
        key = tuple(axis for axis in order.split("-") if wide.get(axis))
        seen.setdefault(key, ORDERS.index(order))
    return tuple(seen.values())
