"""A cluster is read from a short name or a TOML file, and one that cannot be is refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.cluster.catalog import catalog, find_device
from triaxial.cluster.spec import Cluster, load_cluster, to_toml
from triaxial.cluster.units import parse_quantity


def ranks_and_links(cluster: Cluster) -> list[tuple[str, int, str, float]]:
    return [(tier.name, tier.ranks, tier.link, tier.links) for tier in cluster.tiers]


class TestNames:
    def test_nodes_gpus_device(self) -> None:
        cluster = load_cluster("4x8xH100-SXM")
        assert (cluster.num_gpus, cluster.num_nodes, cluster.gpus_per_node) == (32, 4, 8)
        assert ranks_and_links(cluster) == [("node", 8, "nvlink4", 1), ("network", 32, "infiniband", 8)]
        # NVIDIA DGX H100 datasheet: 900 GB/s of NVLink both ways per GPU, 400 Gb/s a NIC
        assert [tier.bandwidth_bytes_per_s for tier in cluster.tiers] == [450e9, 50e9]

    def test_one_node_has_no_network(self) -> None:
        assert load_cluster("8xH100-SXM") == load_cluster("1x8xH100-SXM").model_copy(update={"name": "8xH100-SXM"})
        assert len(load_cluster("8xH100-SXM").tiers) == 1

    def test_one_gpu_a_node_is_all_network(self) -> None:
        assert ranks_and_links(load_cluster("4x1xA100-80GB-SXM")) == [("network", 4, "infiniband", 1)]

    def test_one_gpu(self) -> None:
        assert load_cluster("1xL40S").num_gpus == 1

    @pytest.mark.parametrize("name", ["H100", "h100-sxm", "H100_SXM", "h100 sxm5 80gb", "H100-80GB-HBM3"])
    def test_spelling_does_not_matter(self, name: str) -> None:
        assert find_device(name).name == "H100-SXM"

    def test_part_of_a_node_keeps_its_share_of_nics(self) -> None:
        assert ranks_and_links(load_cluster("2x4xH100-SXM")) == [
            ("node", 4, "nvlink4", 1),
            ("network", 8, "infiniband", 4),
        ]

    def test_pcie_server_has_tiers_inside(self) -> None:
        assert [(tier.ranks, tier.link) for tier in load_cluster("8xL40S").tiers] == [
            (2, "pcie"),
            (4, "pcie-host"),
            (8, "pcie-socket"),
        ]

    def test_bridged_cards_are_pairs(self) -> None:
        assert [(tier.ranks, tier.link) for tier in load_cluster("8xH100-NVL").tiers] == [(2, "nvlink4"), (8, "pcie")]

    def test_the_smallest_node_that_holds_them_is_taken(self) -> None:
        assert load_cluster("8xV100-32GB-SXM").tiers[0].mesh_rings  # DGX-1
        assert not load_cluster("16xV100-32GB-SXM").tiers[0].mesh_rings  # DGX-2

    @pytest.mark.parametrize(
        ("name", "domain"), [("4x4xGB200", 16), ("18x4xGB200", 72), ("36x4xGB200", 72), ("32x4xGB200", 64)]
    )
    def test_racks_are_one_nvlink_domain(self, name: str, domain: int) -> None:
        cluster = load_cluster(name)
        assert cluster.tiers[0].ranks == domain
        assert cluster.num_gpus == cluster.tiers[-1].ranks == cluster.num_nodes * 4
        assert cluster.tiers[-1].links in (1, domain)  # a NIC for every GPU of the domain


class TestOverrides:
    def test_inter_is_the_rate_of_one_nic(self) -> None:
        network = load_cluster("2x8xA100-80GB-SXM", inter="100Gb/s").tiers[-1]
        assert (network.bandwidth_bytes_per_s, network.links) == (12.5e9, 8)

    def test_inter_with_spaces(self) -> None:
        assert load_cluster("2x8xH100-SXM", inter=" 8 x 400 Gb/s  roce ") == load_cluster(
            "2x8xH100-SXM", inter="400Gb/s roce"
        )

    def test_inter_with_number_and_kind(self) -> None:
        network = load_cluster("2x8xA100-80GB-SXM", inter="4x100Gb/s efa1").tiers[-1]
        assert (network.bandwidth_bytes_per_s, network.links, network.link) == (12.5e9, 4, "efa1")

    def test_intra_link(self) -> None:
        inside = load_cluster("2x8xH100-SXM", intra="pcie4").tiers[0]
        assert (inside.link, inside.ranks, inside.bandwidth_bytes_per_s) == ("pcie", 8, 31.5e9)
        assert not inside.switch_reduces

    def test_intra_rate_keeps_the_topology(self) -> None:
        tiers = load_cluster("8xH100-PCIe", intra="20GB/s").tiers
        assert [(tier.ranks, tier.bandwidth_bytes_per_s) for tier in tiers] == [(2, 20e9), (8, 20e9)]

    def test_price(self) -> None:
        assert load_cluster("8xH100-SXM", gpu_price_per_hour=2.5).gpu_price_per_hour == 2.5


TIER = "gpus_per_node = 8\ndevice = 'H100'\n[[tiers]]\nname = 'n'\nranks = 8\nlink = 'nvlink4'\n"
RATE = "bandwidth_bytes_per_s = 1e9\n"


class TestToml:
    @pytest.mark.parametrize("name", ["4x8xH100-SXM", "8xL40S", "8xV100-16GB-SXM", "36x4xGB300", "1xRTX-5090"])
    def test_round_trip(self, name: str, tmp_path: Path) -> None:
        cluster = load_cluster(name, gpu_price_per_hour=1.25)
        path = tmp_path / "cluster.toml"
        path.write_text(to_toml(cluster))
        assert load_cluster(path) == cluster

    def test_any_number_of_tiers_with_units_and_measured_figures(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(
            """
            gpus_per_node = 8
            device = "B200"
            [[tiers]]
            name = "node"
            ranks = 8
            link = "nvlink5"
            bandwidth_bytes_per_s = "900GB/s"
            latency_s = "1.1us"
            efficiency = 0.8
            [[tiers]]
            name = "rail"
            ranks = 256
            link = "infiniband"
            bandwidth_bytes_per_s = "400Gb/s"
            links = 8
            switch_reduces = true
            [[tiers]]
            name = "spine"
            ranks = 1024
            link = "infiniband"
            bandwidth_bytes_per_s = "400Gb/s"
            links = 256
            oversubscription = 4
            """
        )
        cluster = load_cluster(path)
        assert cluster.name == "mine"
        assert cluster.num_nodes == 128
        assert cluster.device == find_device("B200")
        assert cluster.tiers[0].latency_s == 1.1e-6
        assert [tier.oversubscription for tier in cluster.tiers] == [1, 1, 4]

    def test_a_file_of_an_older_probe_is_to_be_measured_again(self, tmp_path: Path) -> None:
        path = tmp_path / "cluster.toml"
        path.write_text(to_toml(load_cluster("1xL4")).replace("[device]", "[device]\ntimings = {pass_launch_s = 1e-6}"))
        with pytest.raises(BadInput, match=r"device\.timings\..*; `triaxial probe` measures it again$"):
            load_cluster(path)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("gpus_per_node = 8\ndevice = 'H100'\ntiers = []", "tiers"),
            ("gpus_per_node = ", "not TOML"),
            ("gpus_per_node = 8\ndevice = 'H1000'", "did you mean H100"),
            (TIER, "bandwidth"),
            (TIER + "bandwidth_bytes_per_s = '450GB'", "bytes/s"),
            (TIER + "bandwidth_bytes_per_s = 1e9\nsped = 1", "sped"),
            (TIER + RATE + "[[tiers]]\nname = 'n'\nranks = 12\nlink = 'nvlink4'\n" + RATE, "larger multiple of the 8"),
            (
                TIER.replace("nvlink4", "roce") + RATE + "[[tiers]]\nname = 'x'\nranks = 16\nlink = 'pcie'\n" + RATE,
                "'x' .pcie. lies inside nodes: put it before 'n'",
            ),
        ],
    )
    def test_a_file_that_describes_no_cluster(self, text: str, complaint: str, tmp_path: Path) -> None:
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        with pytest.raises(BadInput, match=complaint) as caught:
            load_cluster(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "overrides", "complaint"),
    [
        ("4x8xH10", {}, "did you mean H100"),
        ("4x8xXYZ", {}, "known: A100"),
        ("eight H100", {}, "NODESxGPUSxDEVICE"),
        ("0x8xH100", {}, "at least 1"),
        ("2x9xH100", {}, "at most 8 GPUs"),
        ("nowhere.toml", {}, "cannot read"),
        ("2x8xH100", {"inter": "fast"}, "400Gb/s"),
        ("2x8xH100", {"inter": "0Gb/s"}, "more than zero"),
        ("2x8xH100", {"inter": "0x400Gb/s"}, "rate of one NIC"),
        ("2x8xH100", {"inter": "400Gb/s carrier-pigeon"}, "infiniband"),
        ("8xH100", {"inter": "400Gb/s"}, "no network"),
        ("2x8xH100", {"intra": "pcie9"}, "did you mean pcie"),
        ("2x1xH100", {"intra": "pcie4"}, "no links inside"),
        ("8xH100", {"gpu_price_per_hour": -1}, "gpu_price_per_hour"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_fix(name: str, overrides: dict[str, str], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint) as caught:
        load_cluster(name, **overrides)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


class TestUnits:
    @pytest.mark.parametrize(
        ("text", "dimension", "value"),
        [
            ("400Gb/s", "bytes/s", 50e9),
            ("50 GB/s", "bytes/s", 50e9),
            ("400Gbit/s", "bytes/s", 50e9),
            ("1GiB/s", "bytes/s", 2**30),
            ("80GiB", "bytes", 80 * 2**30),
            ("2.5us", "seconds", 2.5e-6),
            ("0s", "seconds", 0.0),
            ("989.4TFLOP/s", "FLOP/s", 989.4e12),
            ("1.5e9", "bytes", 1.5e9),
        ],
    )
    def test_values(self, text: str, dimension: str, value: float) -> None:
        assert parse_quantity(text, dimension) == value  # type: ignore[arg-type]

    @pytest.mark.parametrize("text", ["400G/s", "GB/s", "4..0GB/s", "400mb/s", "400Gb/s/s", "", "-1GB/s", "80GiB"])
    def test_refused(self, text: str) -> None:
        with pytest.raises(BadInput, match="write it like"):
            parse_quantity(text, "bytes/s")

    @given(st.integers(1, 10**6))
    def test_prefixes_scale_exactly(self, number: int) -> None:
        rates = {parse_quantity(f"{number}{text}", "bytes/s") for text in ("000GB/s", "TB/s", "000000MB/s")}
        assert rates == {parse_quantity(f"{8 * number}Tb/s", "bytes/s")}


class TestCatalogue:
    def test_every_device_has_a_node_and_a_source(self) -> None:
        known = catalog()
        for name, device in known.devices.items():
            assert device.name == name
            assert any(name in node.devices for node in known.nodes)
            assert device.source
        assert set(known.aliases.values()) <= set(known.devices)
        assert {name for node in known.nodes for name in node.devices} <= set(known.devices)

    def test_peaks_are_dense_and_those_of_8_bits_twice_those_of_16(self) -> None:
        for device in catalog().devices.values():
            peaks = device.peak_flop_per_s
            assert "fp16" in peaks
            if "fp8" in peaks:
                assert peaks["fp8"] == pytest.approx(2 * peaks["fp16"], rel=0.02)
            if device.generation != "blackwell":
                assert peaks["fp16"] / device.sm_count < 8e12, "no dense multiprocessor was that fast before Blackwell"

    @pytest.mark.parametrize(
        ("name", "bf16", "bandwidth"),
        [
            ("A100-80GB-SXM", 312e12, 2039e9),  # NVIDIA A100 datasheet
            ("H100-SXM", 989.4e12, 3352e9),  # NVIDIA H100 whitepaper, table 2
            ("L40S", 362.05e12, 864e9),  # NVIDIA L40S datasheet
            ("B200", 2250e12, 7.7e12),  # NVIDIA Blackwell technical brief, table 3
            ("MI300X", 1307.4e12, 5.3e12),  # AMD MI300X data sheet
        ],
    )
    def test_published_figures(self, name: str, bf16: float, bandwidth: float) -> None:
        device = find_device(name)
        assert (device.peak("bf16"), device.memory_bandwidth_bytes_per_s) == (bf16, bandwidth)

    def test_a_precision_without_units_is_refused(self) -> None:
        with pytest.raises(BadInput, match="V100-32GB-SXM has no fp8 matrix units; choose one of fp64, fp32, fp16"):
            find_device("V100").peak("fp8")


def test_importing_the_cluster_does_not_import_torch() -> None:
    code = "import sys, triaxial.plan.cost.collectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
