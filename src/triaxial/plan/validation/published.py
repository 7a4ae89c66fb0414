"""Published training points, read from a CSV into what the planner needs to predict them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from triaxial import BadInput
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.model.spec import Experts, LatentAttention, ModelSpec
from triaxial.plan.cost.practice import Practice
from triaxial.plan.layout import Layout, Recompute, ScheduleKind
from triaxial.plan.validation.practices import practice_of
from triaxial.plan.workload import Precision, Training

REQUIRED_COLUMNS = ("id", "gpu", "gpus", "layers", "hidden", "heads", "seq_len", "global_batch", "tp", "pp", "dp")
ZERO_BUBBLE_NETWORK = "4x100Gb/s roce"
"""Of arXiv 2401.10241: four devices a node (examples/test_all_schedules.sh of its repository), at the rate that its
transfers show (table 9: with 14 and 28 of 15 and 31 hops inside nodes, those of 10.5 and 12.6 MB took 0.38 and 0.41 ms
on average)."""
DEFAULT_VOCAB = 50_304
"""GPT-2's vocabulary padded to a multiple of 128: what Megatron's scripts use where a source states none."""

DEEPSEEK_ATTENTION = LatentAttention(query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
"""Latent attention of DeepSeek-V3 and Kimi-K2, the published models that have it (their config.json)."""

_SCHEDULES: dict[str, ScheduleKind] = {
    "": "1f1b",
    "1f1b": "1f1b",
    "interleaved-1f1b": "interleaved",
    "ZB-1p": "zb-h1",
    "ZB-2p": "zb-h2",
    "ZB-V": "zb-v",
    "DualPipe": "zb-v",
}


STATED_ELSEWHERE = {
    ("sc21t1", gpus): {"micro_batch": micro_batch, "vpp": virtual_stages}
    for gpus, micro_batch, virtual_stages in (
        ("32", "16", "1"),
        ("64", "16", "1"),
        ("128", "16", "1"),
        ("256", "8", "1"),
        ("512", "4", "1"),
        ("1024", "2", "3"),
        ("1536", "2", "2"),
        ("1920", "1", "2"),
        ("2520", "1", "3"),
        ("3072", "1", "1"),
    )
}
"""Cells that a table leaves empty and its authors fill in another place, by source and GPUs: table 1 of arXiv 2104.04473
by NVIDIA/Megatron-LM's examples/sc21/run_table_1.sh."""

COMPOSED = ("vts",)
"""Sources whose rows are sums of one profiled layer, each forward and backward pass once, whatever their
configuration says of recomputation (docs/measured/planner.md)."""


@dataclass(frozen=True)
class Point:
    """One measured training step and all the layouts that its source may have meant."""

    id: str
    source: str
    """Prefix of the id: who measured it."""
    table: str
    """Where exactly it was read: rows of one table were measured with one version of one program."""
    config_group: str
    """Rows that share it are one configuration measured again."""
    model: ModelSpec
    cluster: Cluster
    training: Training
    practice: Practice
    layouts: tuple[Layout, ...]
    """One per plausible value of the cells that the source leaves empty."""
    recipe: str
    """The precision in the source's words: two ways to multiply in 8 bits are two programs."""
    step_time_s: float
    memory_gib: float | None

    @property
    def job(self) -> tuple[object, ...]:
        """What stays the same over rows that vary only the layout."""
        sizes = (self.model.num_layers, self.model.hidden, self.model.vocab, self.model.ffn)
        device = self.cluster.device.name
        return (self.table, device, self.cluster.num_gpus, *sizes, self.training, self.practice, self.recipe)


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be predicted, and why."""

    id: str
    reason: str


def read_points(path: Path) -> tuple[list[Point], list[Skipped]]:
    """Read every row of a CSV of training points.

    Raises:
        BadInput: no such file, or no table of training points.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    missing = [name for name in REQUIRED_COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise BadInput(f"{path} is no table of training points: it lacks {', '.join(missing)}")
    points: list[Point] = []
    skipped: list[Skipped] = []
    for row in rows:
        try:
            points.append(_point(row))
        except (BadInput, ValueError) as error:
            skipped.append(Skipped(row["id"], str(error)))
    return points, skipped


def _point(row: dict[str, str]) -> Point:
    if not row.get("step_time_s"):
        raise BadInput("no step time")
    source = row["id"].rsplit("-", 1)[0]
    known = STATED_ELSEWHERE.get((source, row["gpus"]), {})
    row = {**row, **{name: cell for name, cell in known.items() if not row.get(name)}}
    return Point(
        id=row["id"],
        source=source,
        table=row.get("source", source),
        config_group=row.get("config_group") or row["id"],
        model=_model(row),
        cluster=_cluster(row["gpu"], int(row["gpus"]), int(row.get("gpus_per_node") or 8), row.get("inter_link", "")),
        training=Training(
            global_batch=int(row["global_batch"]),
            seq_len=int(row["seq_len"]),
            precision=_precision(row.get("precision", "")),
        ),
        practice=practice_of(
            source, row.get("notes", ""), _zero(row.get("zero_stage_or_fsdp", ""), source), int(row["pp"])
        ),
        layouts=tuple(_layouts(row, source)),
        recipe=row.get("precision", ""),
        step_time_s=float(row["step_time_s"]),
        memory_gib=float(row["memory_gib"]) if row.get("memory_gib") else None,
    )


def _model(row: dict[str, str]) -> ModelSpec:
    heads, hidden = int(row["heads"]), int(row["hidden"])
    gated = row.get("gated_mlp") == "1"
    return ModelSpec(
        name=row.get("model_name") or row["id"],
        family="llama" if gated else "gpt3",
        num_layers=int(row["layers"]),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=int(row.get("kv_heads") or heads),
        head_dim=int(row.get("head_dim") or hidden // heads),
        ffn=int(row.get("ffn") or 4 * hidden),
        vocab=int(row.get("vocab") or DEFAULT_VOCAB),
        max_positions=int(row["seq_len"]),
        gated_mlp=gated,
        learned_positions=not gated,
        layer_norm=not gated,
        qkv_bias=not gated,
        out_bias=not gated,
        mlp_bias=not gated,
        tied_embeddings=row.get("tied_embeddings") == "1",
        experts=_experts(row) if row.get("experts") else None,
        latent=DEEPSEEK_ATTENTION if "MLA" in row.get("notes", "") else None,
    )


def _experts(row: dict[str, str]) -> Experts:
    return Experts(
        count=int(row["experts"]),
        per_token=int(row["topk"]),
        ffn=int(row.get("moe_ffn") or row["ffn"]),
        shared=int(row.get("shared_experts") or 0),
        first_dense_layers=int(row.get("dense_layers") or 0),
    )


def _precision(text: str) -> Precision:
    if "fp4" in text:
        return "fp4"
    if "fp8" in text:
        return "fp8"
    return "bf16" if text.startswith("bf16") else "fp16"


@lru_cache(maxsize=1024)
def _cluster(gpu: str, gpus: int, per_node: int, inter_link: str) -> Cluster:
    """The machine of a row, as the catalogue has it, with the network that the source states."""
    name = gpu.partition(" (")[0].replace("94/95GB", "96GB")
    nodes, inside = max(gpus // per_node, 1), min(gpus, per_node)
    inter = _network(inter_link, per_node) if nodes > 1 else None
    return load_cluster(f"{nodes}x{inside}x{name}", inter=inter)


def _network(text: str, per_node: int) -> str | None:
    """NICs a node and their rate, where a source states them."""
    if match := re.match(r"(\d+)x(\d+)Gb/s", text):
        return f"{match[1]}x{match[2]}Gb/s"
    if match := re.match(r"(\d+)Gb/s per node", text):
        return f"{per_node}x{int(match[1]) / per_node:g}Gb/s"
    if match := re.match(r"(\d+)Gb/s", text):
        return f"{per_node}x{match[1]}Gb/s"
    if text.startswith("4x ConnectX-6"):
        return "4x200Gb/s"
    if text == "RoCE RDMA":
        return ZERO_BUBBLE_NETWORK
    return None


def _layouts(row: dict[str, str], source: str) -> Iterator[Layout]:
    """All layouts that a row may mean: one per plausible value of its empty cells."""
    tp, pp, dp, cp = (int(row.get(axis) or 1) for axis in ("tp", "pp", "dp", "cp"))
    if tp * pp * dp * cp != int(row["gpus"]):
        raise BadInput(f"tp*pp*dp*cp is {tp * pp * dp * cp}, not {row['gpus']} GPUs")
    layers, schedule = int(row["layers"]), _SCHEDULES[row.get("schedule", "")]
    per_rank = int(row["global_batch"]) // dp
    micro = [int(row["micro_batch"])] if row.get("micro_batch") else [n for n in (1, 2, 4, 8) if per_rank % n == 0]
    # tables that do not speak of recomputation are of recipes tuned to do without
    recompute: Recompute = "none" if source in COMPOSED else row.get("recompute") or "none"  # type: ignore[assignment]
    for vpp in _virtual_stages(row.get("vpp", ""), layers, pp, schedule):
        kind = "interleaved" if vpp > 1 and schedule == "1f1b" else schedule
        for mb in micro:
            yield Layout(
                tp=tp,
                pp=pp,
                dp=dp,
                cp=cp,
                ep=int(row.get("ep") or 1),
                vpp=vpp,
                mb=mb,
                schedule=kind if kind != "interleaved" or vpp > 1 else "1f1b",
                zero=_zero(row.get("zero_stage_or_fsdp", ""), source),
                sp=row["sp"] == "1" if row.get("sp") else tp > 1,
                recompute=recompute,
                cut=_uniform_cut(layers, pp * vpp),
            )


def _virtual_stages(text: str, layers: int, pp: int, schedule: ScheduleKind) -> list[int]:
    if schedule == "zb-v":
        return [2]
    if text:
        return [int(text)]
    if schedule == "interleaved" and pp > 1:
        return [n for n in range(2, layers // pp + 1) if layers % (pp * n) == 0][:4] or [1]
    return [1]


def _zero(text: str, source: str) -> int:
    """ZeRO stage; NeMo's and Megatron-Bridge's recipes shard the optimizer where their tables say nothing."""
    if "FSDP" in text:
        return 3
    if text[:1].isdigit():
        return int(text[0])
    return 1 if source in ("nemo2407", "nemolong", "mbridge25", "mbridge26") else 0


def _uniform_cut(layers: int, stages: int) -> tuple[int, ...]:
    """Equal layers on every stage as Megatron cuts, or equal blocks where embedding and head count as layers; else
    the balanced cut."""
    if layers % stages == 0:
        each = layers // stages
        return (layers + 2,) if stages == 1 else (each + 1, *(each,) * (stages - 2), each + 1)
    if (layers + 2) % stages == 0:
        return ((layers + 2) // stages,) * stages
    return ()
