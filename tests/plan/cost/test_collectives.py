"""Collectives: near published measurements, limited by the links they cross, and placed by the order of the ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.cluster.hardware import Tier
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.plan.cost.collectives import (
    CollectiveKind,
    Group,
    collective_seconds,
    direct_all_reduce_seconds,
    group_of,
)

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "send_recv",
    "broadcast",
)
CLUSTERS = ("4x8xH100-SXM", "2x8xA100-80GB-SXM", "8xL40S", "2x8xL40S", "8xV100-16GB-SXM", "36x4xGB200", "3x8xH100-NVL")

kinds = st.sampled_from(KINDS)
clusters = st.sampled_from(CLUSTERS).map(load_cluster)
message_bytes = st.integers(1, 10**10)


def seconds(cluster: Cluster, kind: CollectiveKind, size: float, group: Group) -> float:
    return float(collective_seconds(cluster, kind, size, group))


def lone(cluster: Cluster, ranks: int) -> Group:
    return group_of(cluster, {"group": ranks}, "group")


def with_tiers(cluster: Cluster, **update: Any) -> Cluster:
    return cluster.model_copy(update={"tiers": tuple(tier.model_copy(update=update) for tier in cluster.tiers)})


@st.composite
def cluster_and_group(draw: st.DrawFn) -> tuple[Cluster, Group]:
    cluster = draw(clusters)
    sizes = {}
    left = cluster.num_gpus
    for axis in ("a", "b", "c"):
        sizes[axis] = draw(st.integers(1, left))
        left //= sizes[axis]
    return cluster, group_of(cluster, sizes, draw(st.sampled_from(["a", "b", "c"])))


class TestMeasured:
    @pytest.mark.parametrize(
        ("name", "inter", "kind", "ranks", "size", "measured_us"),
        [
            # ai-dynamo/aiconfigurator, nccl_perf.parquet of each system
            ("8xA100-80GB-SXM", None, "all_reduce", 8, 536870912, 4225.9),  # aic-144
            ("8xA100-80GB-SXM", None, "all_gather", 2, 512, 8.98),  # aic-001
            ("8xH100-SXM", None, "all_reduce", 8, 536870912, 2111.06),  # aic-288: NVLink SHARP
            ("8xH100-SXM", None, "all_reduce", 8, 512, 15.59),  # aic-277
            ("8xH100-SXM", None, "reduce_scatter", 4, 134217728, 355.17),  # aic-226
            ("8xH100-SXM", None, "all_to_all", 8, 134217728, 402.42),  # aic-262
            ("8xB200", None, "all_reduce", 8, 536870912, 1334.56),  # aic-576
            ("8xB200", None, "all_gather", 4, 512, 11.15),  # aic-481
            ("8xL40S", None, "all_gather", 2, 134217728, 3476.1),  # aic-682: one PCIe switch
            ("8xL40S", None, "all_reduce", 4, 134217728, 39325),  # aic-766: through the host
            ("8xL40S", None, "all_reduce", 8, 134217728, 162481),  # aic-814: between sockets
            # VIA-Research/vTrain, trace/v100
            ("8xV100-16GB-SXM", None, "all_reduce", 2, 1073741824, 47610),  # vtrain-048: one NVLink
            ("8xV100-16GB-SXM", None, "all_reduce", 4, 1073741824, 18869),  # vtrain-060
            ("8xV100-16GB-SXM", None, "all_reduce", 8, 1073741824, 13969),  # vtrain-084
            # awslabs/awsome-distributed-training, micro-benchmarks/nccl-tests
            ("2x8xA100-80GB-SXM", "4x100Gb/s efa1", "all_reduce", 16, 1073741824, 26217),  # aws-028
            ("2x8xA100-80GB-SXM", "4x100Gb/s efa1", "all_reduce", 16, 512, 162.3),  # aws-007
            ("2x8xH100-SXM", "32x100Gb/s efa", "all_reduce", 16, 1073741824, 4607.6),  # aws-057
            ("2x8xH100-SXM", "32x100Gb/s efa", "all_reduce", 16, 512, 69.5),  # aws-036
        ],
    )
    def test_times(
        self, name: str, inter: str | None, kind: CollectiveKind, ranks: int, size: int, measured_us: float
    ) -> None:
        cluster = load_cluster(name, inter=inter)
        assert seconds(cluster, kind, size, lone(cluster, ranks)) * 1e6 == pytest.approx(measured_us, rel=0.22)


class TestPlacement:
    CLUSTER = load_cluster("4x8xH100-SXM")

    def test_the_fastest_axis_stays_in_the_node(self) -> None:
        group = group_of(self.CLUSTER, {"tp": 8, "dp": 4}, "tp")
        assert group == Group(members=(8, 8), sharing=(1, 4))

    def test_the_slowest_axis_has_one_rank_a_node_and_shares_the_nics(self) -> None:
        group = group_of(self.CLUSTER, {"tp": 8, "dp": 4}, "dp")
        assert group == Group(members=(1, 4), sharing=(8, 8))

    def test_an_axis_between(self) -> None:
        assert group_of(self.CLUSTER, {"tp": 2, "dp": 8, "pp": 2}, "dp") == Group(members=(4, 8), sharing=(2, 4))

    def test_an_axis_wider_than_a_node(self) -> None:
        assert group_of(self.CLUSTER, {"tp": 16, "pp": 2}, "tp") == Group(members=(8, 16), sharing=(1, 2))

    def test_fewer_ranks_than_gpus(self) -> None:
        assert group_of(self.CLUSTER, {"tp": 2}, "tp") == Group(members=(2, 2), sharing=(1, 1))

    def test_inner_tiers(self) -> None:
        assert group_of(load_cluster("8xL40S"), {"tp": 2, "dp": 4}, "dp").members == (1, 2, 4)

    def test_sizes_that_divide_nothing(self) -> None:
        assert group_of(self.CLUSTER, {"tp": 3, "dp": 10}, "tp").members == (3, 3)
        assert group_of(self.CLUSTER, {"tp": 3, "dp": 10}, "dp").members == (3, 10)

    def test_an_unknown_axis_or_too_many_ranks_are_refused(self) -> None:
        with pytest.raises(BadInput, match="no axis 'ep': the axes are tp, dp"):
            group_of(self.CLUSTER, {"tp": 8, "dp": 4}, "ep")
        with pytest.raises(BadInput, match="64 ranks are more than the 32 GPUs"):
            group_of(self.CLUSTER, {"tp": 8, "dp": 8}, "dp")

    def test_an_unknown_kind_is_refused(self) -> None:
        with pytest.raises(BadInput, match="choose one of all_reduce"):
            collective_seconds(self.CLUSTER, "gossip", 1, lone(self.CLUSTER, 8))  # type: ignore[arg-type]


class TestLinks:
    def test_groups_that_talk_at_once_share_the_nics(self) -> None:
        """8 groups with one rank a node get an eighth of what one group over all GPUs gets of the network."""
        cluster = load_cluster("2x8xA100-80GB-SXM", inter="1x100Gb/s")
        together = seconds(cluster, "all_reduce", 1e9, group_of(cluster, {"tp": 8, "dp": 2}, "dp"))
        alone = seconds(cluster, "all_reduce", 1e9, Group(members=(1, 2), sharing=(1, 1)))
        assert together == pytest.approx(8 * alone, rel=0.05)

    def test_one_group_over_two_nodes_uses_every_nic(self) -> None:
        narrow, wide = (load_cluster("2x8xH100-SXM", inter=f"{nics}x100Gb/s") for nics in (1, 4))
        assert seconds(narrow, "all_gather", 1e9, lone(narrow, 16)) == pytest.approx(
            4 * seconds(wide, "all_gather", 1e9, lone(wide, 16)), rel=0.05
        )

    def test_a_ring_crosses_a_node_boundary_once(self) -> None:
        """16 ranks on two nodes move (n-1)/n of an all-gather over each node's NICs, not 8 times that."""
        cluster = load_cluster("2x8xH100-SXM", inter="1x100Gb/s")
        network = cluster.tiers[-1].bandwidth_bytes_per_s
        assert seconds(cluster, "all_gather", 1e9, lone(cluster, 16)) < 1.2 * 15 / 16 * 1e9 / network

    def test_the_order_of_the_ranks_decides_which_axis_pays_for_the_network(self) -> None:
        cluster = load_cluster("8x8xH100-SXM")
        inside = group_of(cluster, {"tp": 8, "dp": 8}, "tp")
        across = group_of(cluster, {"dp": 8, "tp": 8}, "tp")
        assert seconds(cluster, "all_reduce", 1e8, across) > 4 * seconds(cluster, "all_reduce", 1e8, inside)

    def test_an_oversubscribed_spine_is_slower(self) -> None:
        cluster = load_cluster("4x8xH100-SXM")
        spine = with_tiers(cluster, oversubscription=4.0)
        group = lone(cluster, 32)
        assert seconds(spine, "all_gather", 1e9, group) > 3 * seconds(cluster, "all_gather", 1e9, group)

    def test_switches_that_add_help_large_all_reduces_only(self) -> None:
        cluster = load_cluster("8xH100-SXM")
        plain = with_tiers(cluster, switch_reduces=False)
        group = lone(cluster, 8)
        assert seconds(cluster, "all_reduce", 1e9, group) < 0.9 * seconds(plain, "all_reduce", 1e9, group)
        assert seconds(cluster, "all_reduce", 1e4, group) == seconds(plain, "all_reduce", 1e4, group)
        assert seconds(cluster, "all_gather", 1e9, group) == seconds(plain, "all_gather", 1e9, group)

    def test_switches_that_add_between_nodes_halve_the_network_traffic(self) -> None:
        for name in ("16x8xH100-SXM", "16x8xA100-80GB-SXM"):
            cluster = load_cluster(name, inter="8x50Gb/s")
            network = cluster.tiers[-1].model_copy(update={"switch_reduces": True})
            sharp = cluster.model_copy(update={"tiers": (cluster.tiers[0], network)})
            group = lone(cluster, 128)
            ratio = seconds(cluster, "all_reduce", 1e9, group) / seconds(sharp, "all_reduce", 1e9, group)
            assert 1.8 < ratio < 2

    def test_measured_figures_of_a_tier_replace_the_defaults(self) -> None:
        cluster = load_cluster("8xH100-SXM")
        slow = with_tiers(cluster, latency_s=1e-4, efficiency=0.1)
        group = lone(cluster, 2)
        assert seconds(slow, "all_gather", 8, group) > 1e-4
        assert seconds(slow, "send_recv", 1e9, group) == pytest.approx(1e9 / 45e9, rel=0.05)

    def test_a_single_peer_gets_a_part_of_nvlink(self) -> None:
        """arXiv 2401.10241, table 9: to the next of eight stages in a node, 28.3 and 25.2 MB took 0.60 and 0.53 ms."""
        node = load_cluster("8xA100-80GB-SXM")
        for sequences, hidden, measured_s in ((6, 2304, 0.601e-3), (3, 4096, 0.527e-3)):
            size = sequences * 1024 * hidden * 2
            assert seconds(node, "send_recv", size, lone(node, 8)) == pytest.approx(measured_s, rel=0.05)
        probed = with_tiers(node, efficiency=0.78)
        assert seconds(probed, "send_recv", 1e9, lone(node, 8)) == pytest.approx(1e9 / (300e9 * 0.78), rel=0.1)

    def test_large_groups_take_a_tree(self) -> None:
        """A ring's latency grows with the ranks, a tree's with their logarithm."""
        few, many = (load_cluster(f"{nodes}x8xH100-SXM") for nodes in (4, 64))
        small = [seconds(cluster, "all_reduce", 1e3, lone(cluster, cluster.num_gpus)) for cluster in (few, many)]
        assert small[1] < 3 * small[0]

    def test_direct_kernels_win_for_small_messages_inside_a_node(self) -> None:
        cluster = load_cluster("2x8xH100-SXM")
        inside, across = lone(cluster, 8), lone(cluster, 16)
        assert direct_all_reduce_seconds(cluster, 16_384, inside) < 0.6 * seconds(cluster, "all_reduce", 16_384, inside)
        assert direct_all_reduce_seconds(cluster, 1e9, inside) == seconds(cluster, "all_reduce", 1e9, inside)
        assert direct_all_reduce_seconds(cluster, 1e4, across) == seconds(cluster, "all_reduce", 1e4, across)


class TestShape:
    def test_arrays_agree_with_single_sizes(self) -> None:
        cluster = load_cluster("2x8xH100-SXM")
        sizes = np.array([[1e2, 1e4], [1e6, 1e9]])
        for kind in KINDS:
            together = collective_seconds(cluster, kind, sizes, lone(cluster, 16))
            assert together.shape == sizes.shape
            for index in np.ndindex(*sizes.shape):
                assert together[index] == seconds(cluster, kind, sizes[index], lone(cluster, 16))

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_rank_talks_to_nobody(self, kind: CollectiveKind) -> None:
        cluster = load_cluster("2x8xH100-SXM")
        assert seconds(cluster, kind, 1e9, lone(cluster, 1)) == 0


@settings(deadline=None)
@given(cluster_and_group(), kinds, message_bytes, st.floats(1, 100))
def test_more_bandwidth_and_less_latency_are_never_slower(
    placed: tuple[Cluster, Group], kind: CollectiveKind, size: int, factor: float
) -> None:
    cluster, group = placed
    before = seconds(cluster, kind, size, group)

    def better(tier: Tier) -> list[dict[str, float]]:
        return [
            {"bandwidth_bytes_per_s": tier.bandwidth_bytes_per_s * factor},
            {"links": tier.links * factor},
            {"latency_s": 0.0},
            {"efficiency": 1.0},
        ]

    for index, tier in enumerate(cluster.tiers):
        for update in better(tier):
            tiers = [*cluster.tiers]
            tiers[index] = tier.model_copy(update=update)
            assert seconds(cluster.model_copy(update={"tiers": tuple(tiers)}), kind, size, group) <= before * (1 + 1e-9)


@settings(deadline=None)
@given(cluster_and_group(), kinds, message_bytes, message_bytes)
def test_more_bytes_never_take_less_time(
    placed: tuple[Cluster, Group], kind: CollectiveKind, size: int, more: int
) -> None:
    cluster, group = placed
    before, after = collective_seconds(cluster, kind, [size, size + more], group)
    assert 0 <= before <= after < math.inf
    assert (before == 0) == (group.size == 1)


@settings(deadline=None)
@given(cluster_and_group(), message_bytes)
def test_no_collective_beats_the_links(placed: tuple[Cluster, Group], size: int) -> None:
    """What the outermost links must carry, at their published rate, is a bound for every kind."""
    cluster, group = placed
    crossed = [
        (tier, below)
        for tier, members, below in zip(cluster.tiers, group.members, (1, *group.members))
        if members > below
    ]
    if not crossed:
        return
    tier, inner = crossed[-1]
    outgoing = tier.links * tier.bandwidth_bytes_per_s * (max(tier.mesh_rings) if tier.mesh_rings else 1)
    share = 1 if tier.switch_reduces else (group.size - inner) / group.size
    assert seconds(cluster, "all_reduce", size, group) > share * size / outgoing
    assert seconds(cluster, "all_to_all", size, group) > inner * (1 - inner / group.size) * size / outgoing
    assert seconds(cluster, "send_recv", size, group) > size / outgoing
