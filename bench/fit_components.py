"""Fits the constants of `plan/cost/constants.py` on published measurements and prints their errors.

    python bench/fit_components.py ../shared/validation

reads gemm.csv and collectives.csv of that folder and prints tables in Markdown. Deterministic: every fit starts at the
shipped constants and is one least-squares fit of log time, with a loss that outliers hardly move. Needs scipy.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.plan.cost.collectives import Group, collective_seconds, group_of
from triaxial.plan.cost.compute import gemm_seconds
from triaxial.plan.cost.constants import COLLECTIVES, COMPUTE

Bounds = Mapping[str, tuple[float, float]]
"""A constant's path (`links.nvlink4.latency_s`) to the range it may be fitted in."""

GPUS = {"A100-SXM4-80GB": "ampere", "H100-SXM5-80GB": "hopper", "L40S": "ada"}
SHAPE: Bounds = {
    "ramp_k": (5, 1000),
    "tile_traffic": (2, 100),
    "tail": (0.1, 1),
    "cast_launch_s": (1e-6, 3e-5),
    "cast_bytes": (3, 8),
}
FIGURES: Bounds = {"wide": (0.3, 0.95), "narrow": (0.3, 0.95), "memory": (0.3, 0.95), "launch_s": (2e-6, 2e-5)}

WAYS: Bounds = {
    "launch_share": (0.5, 3),
    "local_copy": (0.05, 1),
    "peer_hops": (1, 10),
    "ll.bandwidth": (0.02, 0.5),
    "ll128.latency": (1, 4),
    "ll128.bandwidth": (0.05, 0.95),
    "simple.latency": (1.5, 10),
    "switch_launch_s": (1e-5, 4e-5),
}
LINK: Bounds = {"latency_s": (1e-7, 2e-4), "efficiency": (0.02, 0.95), "ramp_s": (1e-7, 1e-4)}
SYSTEMS: dict[str, tuple[str, str | None]] = {
    "HGX A100-SXM4-80GB, 1 node": ("8xA100-80GB-SXM", None),
    "HGX H100 80GB HBM3, 1 node": ("8xH100-SXM", None),
    "HGX H200, 1 node": ("8xH200-SXM", None),
    "HGX B200, 1 node": ("8xB200", None),
    "GB200 (one 4-GPU tray)": ("4xGB200", None),
    "8x L40S PCIe server": ("8xL40S", None),
    "A100 server, 1 node": ("8xA100-80GB-SXM", None),
    "V100 server, 1 node": ("8xV100-16GB-SXM", None),
    "2x AWS p4de.24xlarge (8x A100-80GB)": ("2x8xA100-80GB-SXM", "4x100Gb/s efa1"),
    "2x AWS p5.48xlarge (8x H100)": ("2x8xH100-SXM", "32x100Gb/s efa"),
    "2x AWS p5.48xlarge (8x H100), older stack": ("2x8xH100-SXM", "32x100Gb/s efa"),
}
FAMILIES = (("nvlink2", "nvlink3", "nvlink4", "nvlink5"), ("pcie", "pcie-host", "pcie-socket"), ("efa", "efa1"))


@dataclass(frozen=True)
class Series:
    """Measurements of one kind on one machine, and the model's prediction of them under given constants."""

    source: str
    label: str
    parts: tuple[str, ...]
    """Paths of the groups of constants that belong to its hardware alone."""
    predict: Callable[[Any], np.ndarray]
    seconds: np.ndarray
    published: np.ndarray
    """Seconds at the published rate: what the baseline of one constant efficiency divides."""
    fitted_rows: np.ndarray


# ---------------------------------------------------------------- constants by path


def get(constants: Any, path: str) -> float:
    for name in path.split("."):
        constants = constants[name] if isinstance(constants, Mapping) else getattr(constants, name)
    return float(constants)


def put(constants: Any, path: str, value: float) -> Any:
    """A copy of the constants with the one at `path` changed."""
    name, _, rest = path.partition(".")
    if isinstance(constants, Mapping):
        return {**constants, name: put(constants[name], rest, value) if rest else value}
    return replace(constants, **{name: put(getattr(constants, name), rest, value) if rest else value})


def put_all(constants: Any, values: Mapping[str, float]) -> Any:
    for path, value in values.items():
        constants = put(constants, path, value)
    return constants


def fit(constants: Any, series: list[Series], bounds: Bounds) -> Any:
    """The constants with those in `bounds` fitted to the series."""
    low, high = (np.log([bound[side] for bound in bounds.values()]) for side in (0, 1))
    start = np.clip(np.log([get(constants, path) for path in bounds]), low + 1e-6, high - 1e-6)

    def at(point: np.ndarray) -> Any:
        return put_all(constants, dict(zip(bounds, np.exp(point).tolist(), strict=True)))

    def errors(point: np.ndarray) -> np.ndarray:
        chosen = at(point)
        return np.concatenate([np.log(s.predict(chosen) / s.seconds)[s.fitted_rows] for s in series])

    return at(
        least_squares(errors, start, bounds=(low, high), loss="soft_l1", f_scale=0.03, diff_step=3e-3, max_nfev=300).x
    )


# ---------------------------------------------------------------- the measurements


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Iterable[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def gemm_series(folder: Path) -> list[Series]:
    rows = rows_of(folder / "gemm.csv")
    series = []
    for gpu in GPUS:
        device = load_cluster(f"1x{gpu}").device
        for dtype, precision in (("bfloat16", "bf16"), ("fp8", "fp8")):
            mine = [row for row in rows if row["gpu"] == gpu and row["dtype"] == dtype]
            if not mine:
                continue
            m, n, k = (column(mine, name) for name in "mnk")
            weight = n * k * (2 if precision == "bf16" else 1)
            # the L40S keeps up to 96 MiB in its cache, where the benchmark finds a weight again that a model would not
            cached = (gpu == "L40S") & (m <= 256) & (weight <= 96 * 2**20) & (weight > 4.2e6)
            series.append(
                Series(
                    source=gpu,
                    label=f"{gpu} {precision}",
                    parts=(f"generations.{GPUS[gpu]}",),
                    predict=lambda c, a=(device, m, n, k, precision): gemm_seconds(*a, constants=c),
                    seconds=column(mine, "time_us") * 1e-6,
                    published=2 * m * n * k / device.peak(precision),
                    fitted_rows=~np.asarray(cached),
                )
            )
    return series


def collective_series(folder: Path) -> list[Series]:
    rows = rows_of(folder / "collectives.csv")
    series = []
    for key in dict.fromkeys((row["system"], row["link"], row["collective"], row["ranks"]) for row in rows):
        system, link, kind, ranks = key
        mine = [row for row in rows if (row["system"], row["link"], row["collective"], row["ranks"]) == key]
        name, inter = SYSTEMS[system]
        cluster, n, size = load_cluster(name, inter=inter), int(ranks), column(mine, "bytes")
        group = group_of(cluster, {"group": n}, "group")
        series.append(
            Series(
                source=system,
                label=link,
                parts=tuple(f"links.{tier.link}" for tier in cluster.tiers),
                predict=lambda c, a=(cluster, kind, size, group): collective_seconds(*a, constants=c),
                seconds=column(mine, "time_us") * 1e-6,
                published=size * (2 if kind == "all_reduce" else 1) * (n - 1) / n / published_rate(cluster, group),
                fitted_rows=np.ones(len(mine), dtype=bool),
            )
        )
    return series


def published_rate(cluster: Cluster, group: Group) -> float:
    """Slowest published rate, bytes per second and direction, among the links that leave the units of a group."""
    crossed = [t for t, m, below in zip(cluster.tiers, group.members, (1, *group.members), strict=False) if m > below]
    return min(tier.bandwidth_bytes_per_s * tier.links for tier in crossed)


# ---------------------------------------------------------------- fits and cross-validation


def bounds_of(series: list[Series], common: Bounds, own: Bounds) -> Bounds:
    """What can be fitted on these series: the constants that all share and those of the hardware that occurs."""
    parts = sorted({part for s in series for part in s.parts})
    found = dict(common) | {f"{part}.{name}": bound for part in parts for name, bound in own.items()}
    switched = [
        part.replace("links", "switch_efficiency") for part in parts if part[6:] in COLLECTIVES.switch_efficiency
    ]
    return found | dict.fromkeys(switched, (0.3, 0.95))


def leave_one_out(
    series: list[Series], constants: Any, common: Bounds, own: Bounds, families: Iterable[tuple[str, ...]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions of every series by constants fitted without its source: first with its hardware's own figures
    fitted afterwards (what a probe of the machine would give), then with nothing of it at all."""
    probed, blind = [], []
    fits = {}
    for source in dict.fromkeys(s.source for s in series):
        others = [s for s in series if s.source != source]
        seen = fit(constants, others, bounds_of(others, common, own))
        known = {part for s in others for part in s.parts}
        blind_constants = with_family_means(seen, known, own, families)
        mine = [s for s in series if s.source == source]
        fits[source] = (fit(blind_constants, mine, bounds_of(mine, {}, own)), blind_constants)
    for s in series:
        probed.append(s.predict(fits[s.source][0]))
        blind.append(s.predict(fits[s.source][1]))
    return probed, blind


def with_family_means(constants: Any, known: set[str], own: Bounds, families: Iterable[tuple[str, ...]]) -> Any:
    """Hardware that was not seen gets the geometric mean of what was seen of its family, or else of everything."""
    for family in families:
        seen = [part for part in family if part in known] or sorted(known)
        for part in family:
            if part not in known:
                means = {
                    f"{part}.{name}": float(np.exp(np.mean([np.log(get(constants, f"{s}.{name}")) for s in seen])))
                    for name in own
                }
                constants = put_all(constants, means)
    return constants


def constant_efficiency(series: list[Series]) -> list[np.ndarray]:
    """The baseline: one efficiency for everything, the median of all rows."""
    efficiency = np.median(np.concatenate([s.published / s.seconds for s in series]))
    return [s.published / efficiency for s in series]


# ---------------------------------------------------------------- printing


def table(title: str, series: list[Series], columns: Mapping[str, list[np.ndarray]]) -> None:
    print(f"\n{title}\n\n| rows | n | " + " | ".join(columns) + " |")
    print("|---|---:|" + "---:|" * len(columns))
    for label in [*dict.fromkeys(s.label for s in series), "all"]:
        chosen = [i for i, s in enumerate(series) if label in (s.label, "all")]
        count = sum(len(series[i].seconds) for i in chosen)
        print(f"| {label} | {count} | " + " | ".join(errors(series, p, chosen) for p in columns.values()) + " |")


def errors(series: list[Series], predictions: list[np.ndarray], chosen: list[int]) -> str:
    relative = np.concatenate([predictions[i] / series[i].seconds - 1 for i in chosen]) * 100
    size = np.abs(relative)
    return f"{np.median(size):.1f} / {np.quantile(size, 0.9):.1f} / {np.median(relative):+.1f}"


def report(title: str, series: list[Series], constants: Any, common: Bounds, own: Bounds, families: Any) -> None:
    bounds = bounds_of(series, common, own)
    best = fit(constants, series, bounds)
    probed, blind = leave_one_out(series, constants, common, own, families)
    columns = {
        "shipped": [s.predict(constants) for s in series],
        "refitted": [s.predict(best) for s in series],
        "source left out, its figures probed": probed,
        "source left out": blind,
        "one constant efficiency": constant_efficiency(series),
    }
    table(f"{title}: median / 90th percentile of the absolute error and median error, %", series, columns)
    print("\nrefitted: " + ", ".join(f"{path}={get(best, path):.3g}" for path in bounds))


def main(folder: Path) -> None:
    devices = [tuple(f"generations.{name}" for name in GPUS.values())]
    links = [tuple(f"links.{name}" for name in family) for family in FAMILIES]
    report("gemm.csv", gemm_series(folder), COMPUTE, SHAPE, FIGURES, devices)
    report("collectives.csv", collective_series(folder), COLLECTIVES, WAYS, LINK, links)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
