"""Flip points: how far one circumstance must move until another layout wins. Found by search, never by formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from triaxial import BadInput, NoAnswer
from triaxial.cluster.hardware import NETWORK_LINKS
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout
from triaxial.plan.legal import check_training_layout
from triaxial.plan.search.best import search
from triaxial.plan.search.turn import REACH, turning_point
from triaxial.plan.search.what_if import Resource, has_network, scaled, with_gpus
from triaxial.plan.training.price import estimate
from triaxial.plan.workload import Training

PRECISION = 1.03
"""Bisection stops when the flip is known to within this factor."""

World = tuple[Cluster, Training]


@dataclass(frozen=True)
class Flip:
    """The nearest value of one circumstance, in one direction, at which another mixture of axes wins."""

    what: str
    now: float
    at: float | None
    """None: the winner keeps winning within the reach of the search."""
    layout: str
    """The layout that wins there; empty if none fits or none changes."""
    unit: str
    """Empty for counts."""
    upward: bool

    @property
    def direction(self) -> str:
        """`more network per NIC`, `fewer GPUs`."""
        return f"{'more' if self.upward else 'fewer' if self.what == 'GPUs' else 'less'} {self.what}"

    def sentence(self) -> str:
        if self.at is None:
            return f"With up to {2**REACH}x {self.direction} no other mixture wins"
        winner = f"{self.layout} wins" if self.layout else "nothing fits"
        if not self.unit:
            side = "more" if self.upward else "fewer" if self.what == "GPUs" else "less"
            return f"{self.what} {self.at:,.0f} and {side} (now {self.now:,.0f}): {winner}"
        side = "above" if self.upward else "below"
        return f"{self.what} {side} {self.at:.3g} {self.unit} (now {self.now:.3g}): {winner}"


def mixture(layout: Layout) -> tuple[object, ...]:
    """What makes two layouts different in kind: the axes that cut the model, and whether parameters are sharded."""
    return (layout.tp, layout.pp, layout.cp, layout.ep, layout.zero == 3)


def flip_points(model: ModelSpec, cluster: Cluster, training: Training, winner: Layout) -> list[Flip]:
    """Look for the flips of every circumstance in both directions."""
    return list(_flips(model, cluster, training, winner))


def _flips(model: ModelSpec, cluster: Cluster, training: Training, winner: Layout) -> Iterator[Flip]:
    wins = partial(_best, model, winner)
    for what, resource, now, unit in _resources(cluster):
        for upward in (False, True):
            vary = partial(_with_resource, (cluster, training), resource)
            yield _continuous(wins, vary, what, now, unit, winner, upward)
    for count in _counts(model, cluster, training, winner):
        for upward in (False, True):
            yield _counted(wins, count, winner, upward)


def _resources(cluster: Cluster) -> list[tuple[str, Resource, float, str]]:
    rows: list[tuple[str, Resource, float, str]] = [
        ("GPU memory", "memory", cluster.device.memory_bytes / 2**30, "GiB"),
    ]
    inside = [tier for tier in cluster.tiers if tier.link not in NETWORK_LINKS]
    if inside and cluster.num_gpus > 1:
        rows.append(("link inside a node", "links inside a node", inside[0].bandwidth_bytes_per_s / 1e9, "GB/s"))
    if has_network(cluster):
        rate = next(tier.bandwidth_bytes_per_s for tier in cluster.tiers if tier.link in NETWORK_LINKS)
        rows.append(("network per NIC", "network", rate * 8 / 1e9, "Gb/s"))
    return rows


def _with_resource(world: World, resource: Resource, factor: float) -> World:
    return scaled(world[0], resource, factor), world[1]


def _best(model: ModelSpec, winner: Layout, world: World) -> Layout | None:
    """The best layout of a changed world; today's winner, where it still works, tells the search when to stop."""
    try:
        now = estimate(model, *world, winner)
        # a search may cut its stages otherwise
        at_most = now.step_time_s * 1.01 if now.fits else np.inf
    except BadInput:
        at_most = np.inf
    try:
        return search(model, *world, top=1, at_most=at_most).best[0].layout
    except NoAnswer:
        return None


def _same(found: Layout | None, winner: Layout) -> bool:
    return found is not None and mixture(found) == mixture(winner)


def _continuous(
    wins: Callable[[World], Layout | None],
    vary: Callable[[float], World],
    what: str,
    now: float,
    unit: str,
    winner: Layout,
    upward: bool,
) -> Flip:
    turn = turning_point(
        lambda factor: wins(vary(factor)), lambda found: _same(found, winner), upward=upward, precision=PRECISION
    )
    if turn is None:
        return Flip(what, now, None, "", unit, upward)
    factor, found = turn
    return Flip(what, now, now * factor, str(found or ""), unit, upward)


@dataclass(frozen=True)
class _Count:
    """A circumstance that is a whole number."""

    what: str
    now: int
    world: Callable[[int], World]
    step: int
    """Values at which today's layout, or the same with another dp, is legal are multiples of this."""
    legal: Callable[[int], bool]

    def between(self, near: int, far: int) -> list[int]:
        """Legal values from `near` to `far`, both excluded and no two closer than `PRECISION`."""
        low, high = sorted((near, far))
        chosen = [low]
        for value in range(low - low % self.step + self.step, high, self.step):
            if value >= chosen[-1] * PRECISION and self.legal(value):
                chosen.append(value)
        return chosen[1:] if near < far else chosen[:0:-1]


def _counts(model: ModelSpec, cluster: Cluster, training: Training, winner: Layout) -> tuple[_Count, ...]:
    copy = winner.tp * winner.pp * winner.cp

    def carries(work: Training) -> bool:
        try:
            check_training_layout(winner, model, cluster, work)
        except BadInput:
            return False
        return True

    def whole_nodes(gpus: int) -> bool:
        node = cluster.gpus_per_node
        return (gpus % node == 0 or node % gpus == 0) and training.global_batch % (gpus // copy) == 0

    def with_seq_len(n: int) -> World:
        return cluster, replace(training, seq_len=n)

    def with_batch(n: int) -> World:
        return cluster, replace(training, global_batch=n)

    def in_sequences(n: int) -> bool:
        return carries(replace(training, seq_len=n))

    def in_batches(n: int) -> bool:
        return carries(replace(training, global_batch=n))

    return (
        _Count("sequence length", training.seq_len, with_seq_len, 2 * winner.cp * winner.tp, in_sequences),
        _Count("global batch", training.global_batch, with_batch, winner.dp * winner.mb, in_batches),
        _Count("GPUs", cluster.num_gpus, lambda n: (with_gpus(cluster, n), training), copy, whole_nodes),
    )


def _counted(wins: Callable[[World], Layout | None], count: _Count, winner: Layout, upward: bool) -> Flip:
    """Double or halve until the winner changes, then bisect over the values at which it could still win: at others it
    merely does not divide, which says nothing of cost."""
    near, far = count.now, count.now
    for _ in range(REACH):
        if not upward and far % 2:
            return Flip(count.what, count.now, None, "", "", upward)
        near, far = far, far * 2 if upward else far // 2
        try:
            found = wins(count.world(far))
        except BadInput:  # nothing is known of such a cluster
            return Flip(count.what, count.now, None, "", "", upward)
        if not _same(found, winner):
            break
    else:
        return Flip(count.what, count.now, None, "", "", upward)
    between = [*count.between(near, far), far]
    first, last = 0, len(between) - 1  # the winner loses at `last`, and wins before `first`
    while first < last:
        middle = (first + last) // 2
        there = wins(count.world(between[middle]))
        if _same(there, winner):
            first = middle + 1
        else:
            last, found = middle, there
    return Flip(count.what, count.now, between[last], str(found or ""), "", upward)
