"""Links and ranks that are slower than they should be are named, and only those."""

from pathlib import Path

import pytest

from triaxial.cluster.spec import load_cluster
from triaxial.cluster.timings import CollectiveTimings
from triaxial.measure.fit import fit_tier, left_out_errors
from triaxial.measure.links import MeasuredLink, network_bytes_per_s, slow_links
from triaxial.measure.probe import slow_ranks


def test_a_rank_that_is_slow_at_products_is_named() -> None:
    assert slow_ranks([1.0, 1.02, 0.98, 1.14, 1.0]) == ["rank 3 is 14% slower at GEMM than the median"]
    assert slow_ranks([1.0, 1.05, 1.1, 0.9]) == []


def test_a_link_is_held_against_its_nominal_rate() -> None:
    links = [MeasuredLink("node0-node1", 0.38 * 50e9, 50e9), MeasuredLink("node1-node0", 0.9 * 50e9, 50e9)]
    assert slow_links(links) == ["link node0-node1 gives 38% of its nominal rate"]


def test_without_a_nominal_rate_a_link_is_held_against_the_others() -> None:
    rates = (10e9, 10e9, 4e9, 11e9)
    links = [MeasuredLink(f"node{i}-node{(i + 1) % 4}", rate) for i, rate in enumerate(rates)]
    assert slow_links(links) == ["link node2-node3 gives 40% of the median rate"]
    assert slow_links(links[1:3]) == []  # of two, nobody knows which is the slow one
    assert slow_links([]) == []


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """The kernel's account of a host: 25 Gbit/s Ethernet, a faster bridge that is not real, InfiniBand with one port up."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("net/eth0/speed", "25000\n")
    write("net/eth0/device/vendor", "0x15b3\n")
    write("net/eth1/speed", "-1\n")  # no cable
    write("net/eth1/device/vendor", "0x15b3\n")
    write("net/bridge/speed", "100000\n")
    (tmp_path / "net/lo").mkdir()
    for port, state, rate in (("1", "4: ACTIVE", "200 Gb/sec (4X HDR)"), ("2", "1: DOWN", "400 Gb/sec (4X NDR)")):
        write(f"infiniband/mlx5_0/ports/{port}/state", state + "\n")
        write(f"infiniband/mlx5_0/ports/{port}/rate", rate + "\n")
    return tmp_path


def test_nominal_rates_are_what_the_system_says(system: Path) -> None:
    assert network_bytes_per_s(infiniband=True, system=system) == 25e9
    assert network_bytes_per_s(infiniband=False, system=system) == 25e9 / 8
    assert network_bytes_per_s(infiniband=True, system=system / "nowhere") is None


def test_points_on_a_line_are_predicted_from_their_neighbours() -> None:
    """A latency of 10 us and 1 GB/s; one point that takes twice as long is off by half, and lifts its neighbours."""
    sizes = (1000, 2000, 4000, 8000, 16000)
    line = tuple(10e-6 + size / 1e9 for size in sizes)
    curve = CollectiveTimings(kind="all_reduce", members=(2,), sharing=(1.0,), bytes=sizes, seconds=line)
    assert left_out_errors(curve) == pytest.approx([0, 0, 0])
    bent = curve.model_copy(update={"seconds": (*line[:2], 2 * line[2], *line[3:])})
    at_2000 = (2 * line[0] + 2 * line[2]) / 3 / line[1] - 1
    at_8000 = (2 * 2 * line[2] + line[4]) / 3 / line[3] - 1
    assert left_out_errors(bent) == pytest.approx([at_2000, -0.5, at_8000])


def test_the_fit_of_a_line_is_the_line() -> None:
    sizes = (4096, 65536, 1 << 20, 1 << 24)
    seconds = tuple(2 * 3 * 5e-6 + size * 2 * 3 / 4 / 2e9 for size in sizes)  # a ring of 4
    cluster = load_cluster("1x4xA100-SXM4-80GB")
    curve = CollectiveTimings(kind="all_reduce", members=(4,), sharing=(1.0,), bytes=sizes, seconds=seconds)
    fit = fit_tier(cluster, 0, [curve])
    assert fit is not None
    assert fit.latency_s == pytest.approx(5e-6)
    assert fit.bytes_per_s == pytest.approx(2e9)
    assert fit.median_error == pytest.approx(0, abs=1e-9)
    assert fit.left_out_error == pytest.approx(0, abs=1e-9)
    assert fit_tier(cluster, 0, []) is None
