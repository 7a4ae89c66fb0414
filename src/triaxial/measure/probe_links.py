"""What messages take over every tier of links, by the collectives that the runtime itself uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist

from triaxial.cluster.spec import Cluster
from triaxial.cluster.timings import CollectiveTimings
from triaxial.measure.stopwatch import Stopwatch
from triaxial.parallel.emulated import EmulatedStage
from triaxial.parallel.mesh import Axis, Mesh, build_mesh
from triaxial.parallel.pipeline import Pipeline
from triaxial.plan.cost.collectives import group_of
from triaxial.plan.layout import Layout
from triaxial.plan.pipeline.schedule import build_schedule

SIZES = (*(4096 << step for step in range(9)), 4 << 20, 16 << 20)
"""Bytes: 4 KiB to 16 MiB, denser where latency turns into bandwidth."""
_TOO_LONG_S = 0.4
"""A message that takes longer is the last size of its kind."""
_ELEMENT = 4
_PAIR_BYTES = (1 << 20, 32 << 20)
_LONG_ENOUGH_S = 0.005
"""For a message to show its link's rate rather than its latency."""


@dataclass(frozen=True)
class LinkTimings:
    """One kind of collective over one axis of a layout, on every size."""

    axis: str
    size: int
    alone: bool
    """Only one of the axis's groups talks; otherwise all do at once."""
    timings: CollectiveTimings


def link_timings(watch: Stopwatch, cluster: Cluster, rank: int) -> Iterator[LinkTimings]:
    """Time collectives over neighbouring and over distant ranks, in groups of every size that divides the world.

    Args:
        cluster: its tiers say how groups lie; their rates are not used.
    """
    world = watch.world.size
    for size in (n for n in range(2, world + 1) if world % n == 0):
        layout = Layout(tp=size, dp=world // size)
        mesh = build_mesh(layout, rank, size, watch.device)
        for axis in (mesh.tp, mesh.dp):
            if axis.size > 1:
                yield from _collectives(watch, cluster, axis, layout, rank)
        for order in ("pp-tp-cp-dp", "tp-cp-dp-pp"):
            pipeline = Layout(pp=size, dp=world // size, order=order)
            if size == 2 or order == "pp-tp-cp-dp":
                yield _messages(watch, cluster, build_mesh(pipeline, rank, 1, watch.device), pipeline)


def _collectives(watch: Stopwatch, cluster: Cluster, axis: Axis, layout: Layout, rank: int) -> Iterator[LinkTimings]:
    operations: dict[str, Callable[[torch.Tensor], object]] = {
        "all_reduce": axis.all_reduce,
        "reduce_scatter": axis.reduce_scatter,
        # bytes are of the gathered tensor
        "all_gather": lambda x: axis.all_gather(x[: len(x) // axis.size]),
    }
    for kind, operation in operations.items():
        for alone in (False, True) if axis.size < watch.world.size and kind == "all_reduce" else (False,):
            talks = not alone or 0 in axis.ranks
            sizes, seconds = [], []
            for num_bytes in SIZES:
                x = torch.zeros(_whole(num_bytes, axis.size), device=watch.device)
                sizes.append(x.numel() * _ELEMENT)
                seconds.append(watch.slowest(partial(operation, x) if talks else _nothing))
                if seconds[-1] > _TOO_LONG_S:
                    break
            yield _record(cluster, layout, axis.name, kind, alone, sizes, seconds)


def _nothing() -> None:
    """What a silent rank does."""


def _whole(num_bytes: int, ranks: int) -> int:
    """Elements in about so many bytes that every rank can have an equal part of."""
    return math.ceil(num_bytes / _ELEMENT / ranks) * ranks


def _messages(watch: Stopwatch, cluster: Cluster, mesh: Mesh, layout: Layout) -> LinkTimings:
    """Seconds of one hop: an activation goes to the last stage and its gradient back, by the executor itself.

    All pipelines send at once: out of step, those that share a link would use it in both directions at the same time.
    """
    schedule = build_schedule("gpipe", ranks=layout.pp, micro_batches=1)
    sizes, seconds = [], []
    for num_bytes in SIZES:
        shape = (num_bytes // _ELEMENT,)
        pipeline = Pipeline(
            schedule,
            mesh.pp,
            {mesh.pp.index: EmulatedStage(0.0, 0.0, 0.0, 0.0, shape)},
            message_shape=shape,
            dtype=torch.float32,
            device=watch.device,
        )
        sizes.append(num_bytes)
        seconds.append(watch.slowest(pipeline.run, in_step=True) / (2 * (layout.pp - 1)))
        if seconds[-1] > _TOO_LONG_S:
            break
    return _record(cluster, layout, "pp", "send_recv", False, sizes, seconds)


def _record(
    cluster: Cluster, layout: Layout, axis: str, kind: str, alone: bool, sizes: list[int], seconds: list[float]
) -> LinkTimings:
    ranks = {name: int(getattr(layout, name)) for name in layout.order.split("-")}
    group = group_of(cluster, ranks, axis)
    timings = CollectiveTimings(
        kind=kind,
        members=group.members,
        sharing=tuple(1.0 for _ in group.sharing) if alone else group.sharing,
        bytes=tuple(sizes),
        seconds=tuple(accumulate(seconds, max)),  # noise must not make a longer message the quicker one
    )
    return LinkTimings(axis, ranks[axis], alone, timings)


def neighbour_rates(watch: Stopwatch, ranks: Sequence[int]) -> dict[tuple[int, int], float]:
    """Bytes per second from each of these ranks to the next, by their places, one pair after another."""
    places = [(place, (place + 1) % len(ranks)) for place in range(len(ranks))] if len(ranks) > 1 else []
    return {(a, b): _rate(watch, ranks[a], ranks[b]) for a, b in places}


def _rate(watch: Stopwatch, source: int, target: int) -> float:
    """Of a message that is long enough for the link, if that does not take too long."""
    rate = 0.0
    for num_bytes in _PAIR_BYTES:
        x = torch.zeros(num_bytes // _ELEMENT, device=watch.device)
        work: Callable[[], object] = _nothing
        if watch.world.index == source:
            work = partial(dist.send, x, target)
        elif watch.world.index == target:
            work = partial(dist.recv, x, source)
        seconds = watch.slowest(work)
        rate = num_bytes / seconds
        if seconds > _LONG_ENOUGH_S:
            break
    return rate
