"""Logs of every request of a real server, replayed: the same arrivals and lengths on what a step is predicted to cost."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triaxial import BadInput
from triaxial.cluster.catalog import find_device
from triaxial.cluster.hardware import Tier
from triaxial.cluster.spec import Cluster
from triaxial.plan.layout import Layout
from triaxial.plan.serving.constants import SERVING, ServingConstants
from triaxial.plan.serving.cost.step import step_cost
from triaxial.plan.serving.engine import Engine
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.simulate import replay
from triaxial.plan.serving.traffic import Traffic
from triaxial.plan.serving.workload import Serving
from triaxial.plan.validation.serving_points import engine_named, read_table, served_model

LOG_COLUMNS = ("request", "arrival_s", "input_tokens", "output_tokens", "ttft_ms", "e2e_ms", "tpot_ms")
EDITIONS = {"RTXPRO6000": "RTX-PRO-6000-Server"}
"""Devices by the logs' names, where those are not the catalogue's."""
METRICS = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class ServerLog:
    """One run of a vLLM server."""

    name: str
    model_name: str
    cluster: Cluster
    layout: Layout
    work: Serving
    engine: Engine
    traffic: Traffic
    measured: dict[str, NDArray[np.float64]]
    """Milliseconds of every request, by metric."""


@dataclass(frozen=True)
class LogErrors:
    """Milliseconds, measured and predicted, over the requests of one log."""

    name: str
    metric: str
    measured_mean: float
    predicted_mean: float
    measured_p90: float
    predicted_p90: float

    @property
    def error(self) -> float:
        """Of the mean."""
        return self.predicted_mean / self.measured_mean - 1


def read_log(path: Path) -> ServerLog:
    """Read `DEVICE-MODEL.csv` with the engine's settings beside it in `DEVICE-MODEL.json`.

    Raises:
        BadInput: a file is missing or is no such log.
    """
    rows = read_table(path)
    settings_path = path.with_suffix(".json")
    try:
        run = json.loads(settings_path.read_text(encoding="utf-8"))
        settings, version = run["engine_kwargs"], str(run["vllm_version"])
        tp, model_name = int(settings["tensor_parallel_size"]), str(settings["model"])
        columns = {name: np.array([float(row[name]) for row in rows]) for name in LOG_COLUMNS[1:]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: no log of a server with its settings in {settings_path.name} ({error})") from None
    order = np.argsort(columns["arrival_s"], kind="stable")
    inputs, outputs = (columns[name][order].astype(np.int64) for name in ("input_tokens", "output_tokens"))
    return ServerLog(
        name=path.stem,
        model_name=model_name,
        cluster=_machine(path.stem.partition("-")[0], tp),
        layout=Layout(tp=tp),
        work=Serving(
            input_len=max(1, round(float(inputs.mean()))),
            output_len=max(1, round(float(outputs.mean()))),
            max_batch=int(settings["max_num_seqs"]),
            chunk_tokens=int(settings["max_num_batched_tokens"]),
        ),
        engine=engine_named(f"vllm {version}"),
        traffic=Traffic(columns["arrival_s"][order], inputs, outputs),
        measured={name: columns[name][order] for name in METRICS},
    )


def _machine(device_name: str, gpus: int) -> Cluster:
    """As the configurations beside the published logs describe it (casys-kaist/LLMServingSim, bench/examples/configs):
    memory of 1,597 GB/s, which is the device's server edition, and links that messages pass at 16 GB/s."""
    link = Tier(name="socket", ranks=gpus, link="pcie-host", bandwidth_bytes_per_s=16e9, efficiency=1.0)
    device = find_device(EDITIONS.get(device_name, device_name))
    return Cluster(name=device.name, gpus_per_node=gpus, device=device, tiers=(link,))


def replay_log(log: ServerLog, constants: ServingConstants = SERVING) -> list[LogErrors]:
    """Replay a log and compare every metric's mean and 90th percentile. Its times are the engine's own, without a
    server's: its driver calls the engine with token ids (casys-kaist/LLMServingSim, bench/core/runner.py)."""
    engine = replace(log.engine, over_http=False)
    cost = step_cost(served_model(log.model_name), log.cluster, log.layout, log.work, engine, constants)
    limits = Limits(
        max_batch=log.work.max_batch,
        chunk_tokens=log.work.chunk_tokens,
        kv_tokens=cost.memory.max_kv_tokens,
        window=cost.memory.farthest_window,
    )
    served = replay(log.traffic, cost, limits)
    predicted = {
        "ttft_ms": served.ttft_s * 1e3,
        "tpot_ms": served.tpot_s * 1e3,
        "e2e_ms": served.latency_s * 1e3,
    }
    return [
        LogErrors(
            log.name,
            metric,
            float(np.nanmean(log.measured[metric])),
            float(np.nanmean(predicted[metric])),
            float(np.nanpercentile(log.measured[metric], 90)),
            float(np.nanpercentile(predicted[metric], 90)),
        )
        for metric in METRICS
    ]
