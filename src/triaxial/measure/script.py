"""The script of a rehearsal: how long each rank waits and how long its messages are, in dilated time.

A message has as many bytes as the rank's port into its tier carries in the seconds that the plan expects it to take by
itself. So compute, links inside nodes and links between nodes keep their ratios, whatever rate a port has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from triaxial import BadInput
from triaxial.cluster.hardware import Tier
from triaxial.cluster.spec import Cluster
from triaxial.measure.fabric import Port
from triaxial.model.spec import ModelSpec
from triaxial.parallel.emulated import EmulatedBlock
from triaxial.parallel.program import check_runnable
from triaxial.plan.cost.constants import COLLECTIVES
from triaxial.plan.cost.placement import Placement, place
from triaxial.plan.layout import Layout, micro_batches
from triaxial.plan.layout_table import layout_table
from triaxial.plan.training.alone import Alone, price_alone
from triaxial.plan.training.price import Estimate, estimate
from triaxial.plan.workload import Training

MOST_RANKS = 32
"""Beyond, messages would have to last so long that steps take minutes."""
_CARRIED_BYTES_PER_S = 128e6
"""What all ranks' ports into the fastest tier may carry together on this machine, with processors to spare."""
_SLOWEST_BYTES_PER_S = 1e6
"""A slower port would take longer for one packet than short messages last."""
_MESSAGE_S_PER_RANK = 2.5e-3
"""Collectives of all ranks at once cost the machine about a tenth of this for each, so shorter ones would come late."""
_STEP_S, _LONGEST_STEP_S = 8.0, 20.0
_ELEMENT_BYTES = 4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Script:
    """What the ranks of one layout do in a step. Seconds are dilated; elements are of fp32."""

    layout: Layout
    predicted: Estimate
    dilation: float
    ports: tuple[Port, ...]
    shrinkage: tuple[float, ...]
    """Per tier: bytes of the cluster that one byte of the rehearsal stands for."""
    micro_batches: int
    stages: tuple[tuple[EmulatedBlock, ...], ...]
    unit_elements: tuple[tuple[int, ...], ...]
    """[stage][block]: in one reduction of its gradients; 0 where nothing is reduced."""
    message_elements: int
    """Between stages."""
    tied_elements: int
    """Between the ends of the pipeline, once a step."""
    slowed_s: float
    """Waited after the last action, for what computation loses to messages beside it."""
    update_s: float


def write_script(
    model: ModelSpec, cluster: Cluster, training: Training, layout: Layout, dilation: float | None = None
) -> Script:
    """Script a step of a layout.

    Args:
        dilation: seconds of the rehearsal for one of the cluster; None takes what makes messages last long enough.

    Raises:
        BadInput: a layout that cannot be priced or rehearsed.
    """
    check_runnable(layout, model)
    if layout.world_size > MOST_RANKS:
        raise BadInput(f"{layout.world_size} ranks are too many to rehearse: plan for a cluster of up to {MOST_RANKS}")
    predicted = estimate(model, cluster, training, layout)
    alone = price_alone(model, cluster, training, layout, predicted)
    shortest_message_s = _MESSAGE_S_PER_RANK * layout.world_size
    if dilation is None:
        dilation = _choose_dilation(alone, layout, predicted.step_time_s, shortest_message_s)
    rates = [_rank_bytes_per_s(cluster, tier) for tier in range(len(cluster.tiers))]
    ports = _ports(cluster.tiers, rates, layout.world_size)
    lengths = _Lengths(place(cluster, layout_table([layout])), ports, dilation)
    stages, unit_elements = [], []
    for begin, end in pairwise(_starts(alone.cut)):
        runs = _runs(alone, begin, end, shortest_message_s / dilation)
        stages.append(tuple(_blocks(alone, runs, layout, lengths, shortest_message_s / dilation)))
        unit_elements.append(tuple(_reduction(alone, run, layout, lengths) for run in runs))
    return Script(
        layout=layout,
        predicted=predicted,
        dilation=dilation,
        ports=ports,
        shrinkage=tuple(rate / port.bytes_per_s / dilation for rate, port in zip(rates, ports, strict=True)),
        micro_batches=micro_batches(layout, training.global_batch),
        stages=tuple(stages),
        unit_elements=tuple(unit_elements),
        message_elements=max(1, lengths.elements(alone.hop_s, "pp")),
        tied_elements=lengths.elements(alone.tied_s, "pp"),
        slowed_s=alone.slowed_s * dilation,
        update_s=alone.update_s * dilation,
    )


def _choose_dilation(alone: Alone, layout: Layout, step_s: float, shortest_message_s: float) -> float:
    """Steps of some seconds, longer where an action of a stage, its collectives, or the reductions that ZeRO-2 and
    ZeRO-3 do in every action, would be over too soon."""
    starts = _starts(alone.cut)[:-1]
    actions = [np.add.reduceat(part[:2], starts, axis=1).ravel() for part in (alone.compute_s, alone.tp_s)]
    each_action = [*actions, alone.reduce_s] if layout.zero >= 2 else actions
    shortest_s = min(seconds for part in each_action for seconds in part if seconds > 0)
    return float(min(max(_STEP_S / step_s, shortest_message_s / shortest_s), max(_LONGEST_STEP_S / step_s, 1.0)))


def _rank_bytes_per_s(cluster: Cluster, tier: int) -> float:
    """What one rank sends into a tier while all others do so too."""
    link: Tier = cluster.tiers[tier]
    reached = link.efficiency or COLLECTIVES.links[link.link].efficiency
    ranks_below = cluster.tiers[tier - 1].ranks if tier else 1
    return link.bandwidth_bytes_per_s * reached / link.oversubscription * link.links / ranks_below


def _ports(tiers: Sequence[Tier], rates: Sequence[float], world: int) -> tuple[Port, ...]:
    """As fast to each other as the cluster's, as far as packets allow."""
    unit = _CARRIED_BYTES_PER_S / world / max(rates)
    return tuple(
        Port(tier.ranks, max(rate * unit, _SLOWEST_BYTES_PER_S)) for tier, rate in zip(tiers, rates, strict=True)
    )


@dataclass(frozen=True)
class _Lengths:
    """How long messages must be to take their time."""

    placement: Placement
    ports: tuple[Port, ...]
    dilation: float

    def elements(self, seconds: float, span: str, share: float = 1.0) -> int:
        """Of a message between a span's ranks.

        Args:
            seconds: on the cluster.
            share: bytes that leave a rank for each byte of the message.
        """
        group = self.placement.groups[self.placement.spans[span][0]]
        if group.size == 1 or not seconds:
            return 0
        port = self.ports[group.members.index(group.size)]
        num_bytes: float = seconds * self.dilation * port.bytes_per_s / share
        return max(1, round(num_bytes / _ELEMENT_BYTES))


def _starts(cut: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(cut).tolist()]


def _runs(alone: Alone, begin: int, end: int, shortest_message_s: float) -> list[slice]:
    """Blocks [begin, end) in runs that wait and reduce their gradients as one, as many as there are long messages."""
    messages = (alone.tp_s[0, begin:end], alone.tp_s[1, begin:end], alone.reduce_s[begin:end])
    count = min(end - begin, max(_count(seconds.sum(), shortest_message_s) for seconds in messages))
    bounds = np.linspace(begin, end, count + 1).round().astype(int).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def _count(seconds: float, shortest_message_s: float) -> int:
    return max(1, int(seconds / shortest_message_s))


def _gathered(seconds: Sequence[float], shortest_message_s: float) -> list[float]:
    """Seconds of collectives, one after the other, put off until they make messages of equal length, none too short."""
    gathered, owed = [0.0] * len(seconds), 0.0
    each = sum(seconds) / _count(sum(seconds), shortest_message_s)
    for index, one in enumerate(seconds):
        owed += one
        if owed > each * (1 - 1e-9) or index == len(seconds) - 1:
            gathered[index], owed = owed, 0.0
    return gathered


def _blocks(
    alone: Alone, runs: Sequence[slice], layout: Layout, lengths: _Lengths, shortest_message_s: float
) -> Iterator[EmulatedBlock]:
    """A ring carries 2 (n-1)/n of an all-reduce over each link; with sequence parallelism a reduce-scatter and an
    all-gather share the time."""
    ring = 2 * (layout.tp - 1) / layout.tp if layout.tp > 1 else 1.0
    forward, backward = ([float(alone.tp_s[phase, run].sum()) for run in runs] for phase in (0, 1))
    forward = _gathered(forward, shortest_message_s)
    backward = _gathered(backward[::-1], shortest_message_s)[::-1]
    for run, *messages in zip(runs, forward, backward, strict=True):
        waits = (alone.compute_s[:, run].sum(axis=1) * lengths.dilation).tolist()
        yield EmulatedBlock(
            *waits, *(_multiple(lengths.elements(seconds, "tp", ring), layout.tp) for seconds in messages)
        )


def _reduction(alone: Alone, run: slice, layout: Layout, lengths: _Lengths) -> int:
    size = layout.shard_size if layout.zero else layout.dp
    steps = (1 if layout.zero else 2) * (size - 1) / max(size, 1)
    return lengths.elements(float(alone.reduce_s[run].sum()), "shard" if layout.zero else "data", steps or 1.0)


def _multiple(elements: int, of: int) -> int:
    return -(-elements // of) * of
