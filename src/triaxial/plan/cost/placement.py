"""Which links each axis crosses: the groups of ranks behind every collective, for many layouts at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.spec import Cluster
from triaxial.plan.cost.collectives import CollectiveKind, Group, collective_seconds, group_of
from triaxial.plan.cost.timed import timed_collective_seconds
from triaxial.plan.layout_table import ORDERS, Ints, LayoutTable

Floats = NDArray[np.float64]

SPANS = ("tp", "cp", "pp", "shard", "replicas", "data", "ep")
"""The axes that communicate. `data` is dp and cp together: the ranks that reduce gradients; `shard` is the part of
it that ZeRO shards over, `replicas` what remains; `ep` is the part that experts are spread over, or all of
it and some of tp."""


@dataclass(frozen=True)
class Placement:
    """For every layout and span, the position of its group in `groups`."""

    cluster: Cluster
    groups: tuple[Group, ...]
    spans: dict[str, Ints]

    def take(self, rows: NDArray[np.int64]) -> Placement:
        return Placement(self.cluster, self.groups, {name: span[rows] for name, span in self.spans.items()})

    def seconds(self, span: str, kind: CollectiveKind, num_bytes: Floats) -> Floats:
        """Seconds of one collective of `num_bytes` in every layout; nothing to send costs nothing.

        Args:
            span: one of `SPANS`.
            kind: a kind of `collective_seconds`.
            num_bytes: bytes of one rank's full tensor, per layout.
        """
        which = self.spans[span]
        total = np.zeros(len(which))
        for index in np.unique(which) if len(which) > 1 else which:
            group = self.groups[index]
            if group.size > 1:
                mine = which == index
                total[mine] = collective_seconds(self.cluster, kind, num_bytes[mine], group)
        return np.where(num_bytes > 0, total, 0.0)

    def members(self, span: str) -> Ints:
        """Ranks of the span under one unit of every tier, innermost first: [tier, layout]."""
        return np.array([group.members for group in self.groups]).T[:, self.spans[span]]

    def message_seconds(self, span: str, num_bytes: Floats) -> Floats:
        """Seconds of a message from one of the span's ranks to the next, if it crosses the links of each tier and none
        beyond: [tier, layout]. Where a probe has timed the hops of such a group, all take what they did on average.

        Args:
            num_bytes: of the message, per layout.
        """
        which = self.spans[span]
        total = np.zeros((len(self.cluster.tiers), len(which)))
        for index in np.unique(which):
            group, mine = self.groups[index], which == index
            if group.size > 1:
                timed = timed_collective_seconds(
                    self.cluster, "send_recv", num_bytes[mine], group.members, group.sharing
                )
                for tier in range(len(total)):
                    total[tier, mine] = (
                        collective_seconds(self.cluster, "send_recv", num_bytes[mine], group.within(tier))
                        if timed is None
                        else timed
                    )
        return total

    def in_node(self, span: str) -> NDArray[np.bool_]:
        """Whether the span's ranks stand in one node, per layout."""
        ranks = [tier.ranks for tier in self.cluster.tiers]
        node = next(index for index, held in enumerate(ranks) if held >= min(self.cluster.gpus_per_node, ranks[-1]))
        inside = np.array([group.members[node] == group.size for group in self.groups])
        return np.asarray(inside[self.spans[span]])


def strides(table: LayoutTable) -> dict[str, Ints]:
    """Ranks between neighbours on each axis: the product of the axes that vary faster.

    cp counts as the fast part of dp: the two reduce gradients together.
    """
    sizes = {"tp": table.tp, "cp": table.cp, "dp": table.dp, "pp": table.pp}
    result = {axis: np.ones(len(table), dtype=np.int64) for axis in sizes}
    for index in np.unique(table.order):
        rows = table.order == index
        stride = np.ones(int(rows.sum()), dtype=np.int64)
        for axis in ORDERS[index].split("-"):
            result[axis][rows] = stride
            stride = stride * sizes[axis][rows]
    return result


def data_stride(table: LayoutTable) -> Ints:
    """Ranks between neighbours on dp and cp together."""
    stride = strides(table)
    result: Ints = np.minimum(stride["cp"], stride["dp"])
    return result


def place(cluster: Cluster, table: LayoutTable) -> Placement:
    """Find the groups of every layout. Layouts differ in few of them, so each is looked up once."""
    stride = strides(table)
    data = data_stride(table)
    sharded = table.state_shards
    wanted = {
        "tp": (stride["tp"], table.tp),
        "cp": (stride["cp"], table.cp),
        "pp": (stride["pp"], table.pp),
        "data": (data, table.dp * table.cp),
        "shard": (data, sharded),
        "replicas": (data * sharded, table.dp * table.cp // sharded),
        "ep": (np.where(table.expert_folds > 1, np.minimum(stride["tp"], data), data), table.ep),
    }
    keys = {span: step * (cluster.num_gpus + 1) + size for span, (step, size) in wanted.items()}
    distinct, inverse = np.unique(np.concatenate(list(keys.values())), return_inverse=True)
    positions: dict[Group, int] = {}
    found = [_group(cluster, *divmod(key, cluster.num_gpus + 1)) for key in distinct.tolist()]
    position = np.array([positions.setdefault(group, len(positions)) for group in found], dtype=np.int64)
    groups = tuple(positions)
    parts = np.split(position[inverse.reshape(-1)], len(keys))
    return Placement(cluster, groups, dict(zip(keys, parts)))


def _group(cluster: Cluster, stride: int, size: int) -> Group:
    rest = cluster.num_gpus // (stride * size)
    return group_of(cluster, {"inner": stride, "axis": size, "outer": rest}, "axis")
