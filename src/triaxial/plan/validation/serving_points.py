"""Published serving measurements, read from CSVs into what the planner needs to predict them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from triaxial import BadInput
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.model.spec import Experts, ModelSpec, load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.engine import ENGINES, Engine
from triaxial.plan.serving.workload import KVPrecision, Serving, WeightPrecision
from triaxial.plan.validation.published import DEEPSEEK_ATTENTION, Skipped

STATIC_COLUMNS = ("id", "gpu", "model", "tp", "pp", "input_len", "output_len", "concurrency_or_batch", "reported")
LOOP_COLUMNS = ("id", "gpu", "model", "tp", "pp", "input_len", "output_len", "concurrency_or_batch", "engine_version")
STATIC_METRICS = ("e2e_latency_ms", "ttft_ms", "tpot_ms", "output_tokens_per_s", "tokens_per_s_per_gpu")
MAX_LOAD = "max load"
LOOP_METRICS = ("ttft_ms", "tpot_ms")


Load = Literal["batch", "loop", "queue"]
"""One batch from its start to its end; clients that ask again when they are answered; all requests there at once."""
QUEUED_REQUESTS = 1000
"""Of a queue, whose length no source states."""


@dataclass(frozen=True)
class ServedPoint:
    """One measured deployment: `work.concurrency` requests at a time, as a static batch or in a closed loop."""

    id: str
    source: str
    """Who measured it: left out together in cross-validation."""
    model_name: str
    model: ModelSpec
    cluster: Cluster
    layout: Layout
    work: Serving
    engine: Engine
    measured: dict[str, float]
    """By metric: milliseconds, or tokens per second."""
    load: Load = "batch"

    @property
    def job(self) -> tuple[object, ...]:
        """What stays the same over rows that vary only the layout."""
        work = replace(self.work, concurrency=1)
        return (self.source, self.model_name, self.cluster.device.name, self.engine.name, work)


def read_static(path: Path) -> tuple[list[ServedPoint], list[Skipped]]:
    """Static batches and first tokens, like inference.csv: one metric a row, named in its `reported` cell.

    Raises:
        BadInput: no such file, or no such table.
    """
    return _read(path, STATIC_COLUMNS, _static)


def read_loop(path: Path) -> tuple[list[ServedPoint], list[Skipped]]:
    """Closed loops of fixed concurrency, like serving_latency.csv.

    Raises:
        BadInput: no such file, or no such table.
    """
    return _read(path, LOOP_COLUMNS, _loop)


def read_serving(path: Path) -> tuple[list[ServedPoint], list[Skipped]]:
    """Either of the two, by its columns.

    Raises:
        BadInput: no such file, or neither of them.
    """
    rows = read_table(path)
    return read_loop(path) if rows and "engine_version" in rows[0] else read_static(path)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV as texts by column.

    Raises:
        BadInput: no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _read(
    path: Path, columns: tuple[str, ...], point: Callable[[dict[str, str]], ServedPoint]
) -> tuple[list[ServedPoint], list[Skipped]]:
    rows = read_table(path)
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise BadInput(f"{path} is no table of serving points: it lacks {', '.join(missing)}")
    points, skipped = [], []
    for row in rows:
        try:
            points.append(point(row))
        except (BadInput, ValueError) as error:
            skipped.append(Skipped(row["id"], str(error)))
    return points, skipped


def _static(row: dict[str, str]) -> ServedPoint:
    reported = row["reported"].split(";")[0]
    if reported not in STATIC_METRICS or not row[reported]:
        raise BadInput(f"no metric {reported!r}")
    engine = engine_named(row["engine"])
    # a table of first-token latencies has no output length
    work = _work(row, _precision(row["precision"], "fp16"), int(row["output_len"] or 1))
    load: Load = "loop" if engine.continuous else "batch"
    if row["concurrency_or_batch"] == MAX_LOAD:
        load, work = "queue", replace(work, max_batch=QUEUED_REQUESTS)
    point = _point(row, row["id"].rsplit("-", 1)[0], work, engine)
    return replace(point, measured={reported: float(row[reported])}, load=load)


def _loop(row: dict[str, str]) -> ServedPoint:
    precision = _precision(row["gemm_quant"] or row["precision"], "bf16")
    source = f"{row['engine']} {row['model'].rpartition('/')[2]}"
    point = _point(
        row,
        source,
        _work(row, precision, int(row["output_len"])),
        engine_named(f"{row['engine']} {row['engine_version']}"),
    )
    measured = {name: float(row[name]) for name in LOOP_METRICS if row[name]}
    return replace(point, measured=measured, load="loop")


def _precision(text: str, unstated: WeightPrecision) -> WeightPrecision:
    known: tuple[WeightPrecision, ...] = ("fp8", "fp4", "int8", "int4", "bf16", "fp16", "fp32")
    return next((precision for precision in known if precision in text.lower()), unstated)


def _work(row: dict[str, str], precision: WeightPrecision, output_len: int) -> Serving:
    text = row["concurrency_or_batch"]
    batch = QUEUED_REQUESTS if text == MAX_LOAD else int(text)
    kv: KVPrecision = "fp8" if precision in ("fp8", "fp4") else "bf16"
    return Serving(
        input_len=int(row["input_len"]),
        output_len=output_len,
        precision=precision,
        kv_precision=kv,
        concurrency=batch,
    )


def _point(row: dict[str, str], source: str, work: Serving, engine: Engine) -> ServedPoint:
    tp, pp, dp = (int(row.get(axis) or 1) for axis in ("tp", "pp", "dp"))
    return ServedPoint(
        id=row["id"],
        source=source,
        model_name=row["model"],
        model=served_model(row["model"]),
        cluster=_cluster(row["gpu"], tp * pp * dp),
        layout=Layout(tp=tp, pp=pp, dp=dp),
        work=work,
        engine=engine,
        measured={},
    )


def engine_named(text: str) -> Engine:
    """The engine behind a source's word for it and its version.

    Raises:
        BadInput: an unknown one.
    """
    for prefix, engine in ENGINES.items():
        if text.lower().startswith(prefix):
            return engine
    raise BadInput(f"unknown engine {text!r}")


@cache
def _cluster(gpu: str, gpus: int) -> Cluster:
    """Whole nodes of eight: smaller jobs ran on a part of one.

    The published L40S node reaches its peers directly over PCIe: staged through the host, as where collectives.csv was
    measured, its all-reduces alone would take ten times its latencies.
    """
    return load_cluster(f"{max(1, -(-gpus // 8))}x8x{gpu}", intra="pcie4" if gpu == "L40S" else None)


@cache
def served_model(name: str) -> ModelSpec:
    """A model by the name that a table of measurements gives it.

    Raises:
        BadInput: neither a published architecture known here nor a preset.
    """
    for row in csv.DictReader((resources.files("triaxial.plan.validation") / "served_models.csv").open()):
        if name in (row["name"], *row["aliases"].split(";")):
            return _model(row)
    return load_model_spec(name.rpartition("/")[2].lower())


def _model(row: dict[str, str]) -> ModelSpec:
    heads, hidden, gated = int(row["heads"]), int(row["hidden"]), row["gated_mlp"] == "1"
    window, _, every = row["window"].partition("/")
    layers = int(row["layers"])
    return ModelSpec(
        name=row["name"],
        family="llama" if gated else "gpt3",
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=int(row["kv_heads"] or heads),
        head_dim=int(row["head_dim"] or hidden // heads),
        ffn=int(row["ffn"] or row["moe_ffn"] or 4 * hidden),
        vocab=int(row["vocab"]),
        max_positions=2048,
        gated_mlp=gated,
        layer_norm=not gated,
        tied_embeddings=row["tied_embeddings"] == "1",
        sliding_window=int(window) if window else None,
        first_windowed_layer=layers - layers // int(every) if every else 0,
        experts=_experts(row) if row["experts"] else None,
        latent=DEEPSEEK_ATTENTION if row["attention"] == "MLA" else None,
    )


def _experts(row: dict[str, str]) -> Experts:
    return Experts(
        count=int(row["experts"]),
        per_token=int(row["topk"]),
        ffn=int(row["moe_ffn"] or row["ffn"]),
        shared=int(row["shared_experts"] or 0),
        first_dense_layers=int(row["dense_layers"] or 0),
    )
