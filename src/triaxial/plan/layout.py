"""`Layout`: how a model is spread over ranks, as one value with a one-line text form."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Literal, get_args, get_type_hints

from triaxial import BadInput
from triaxial.model.spec import ModelSpec

Recompute = Literal["none", "selective", "full"]
ScheduleKind = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"]

AXES = ("tp", "cp", "dp", "pp")
MAX_SIZE = 1 << 20  # of an axis or a micro-batch: anything beyond is a slip of the keyboard
DEFAULT_ORDER = "-".join(AXES)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to spread a model. `str(layout)` and `parse_layout` are inverses.

    The world has `tp * cp * dp * pp` ranks; expert parallelism reuses the ranks of the dp axis.
    """

    tp: int = 1
    """Tensor-parallel ranks: each operation is cut over them."""
    pp: int = 1
    """Pipeline ranks: each holds `vpp` runs of consecutive layers."""
    dp: int = 1
    """Data-parallel ranks: each sees its own samples."""
    cp: int = 1
    """Context-parallel ranks: each holds a part of every sequence (planned, not run)."""
    ep: int = 1
    """Expert-parallel ranks within dp (planned, not run)."""
    vpp: int = 1
    """Virtual stages per pipeline rank."""
    mb: int = 1
    """Sequences per micro-batch and data-parallel rank."""
    schedule: ScheduleKind = "1f1b"
    zero: int = 0
    """ZeRO stage (arXiv 1910.02054): 1 shards the optimizer state, 2 gradients too, 3 parameters too."""
    shard: int = 0
    """Data-parallel ranks that ZeRO shards over, replicated over the rest (hybrid); 0 is all of them."""
    sp: bool = False
    """Sequence parallelism (arXiv 2205.05198) on the tp axis."""
    recompute: Recompute = "none"
    cut: tuple[int, ...] = ()
    """Blocks per virtual stage (embedding, layers, head); empty is the cost-balanced cut."""
    order: str = DEFAULT_ORDER
    """Axes from the fastest-varying on the ranks to the slowest."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp", "ep", "vpp", "mb"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise BadInput(f"layout: {name} must be 1 to {MAX_SIZE}, not {getattr(self, name)}")
        if self.zero not in (0, 1, 2, 3):
            raise BadInput(f"layout: zero must be 0, 1, 2 or 3, not {self.zero}")
        for name, allowed in (("schedule", get_args(ScheduleKind)), ("recompute", get_args(Recompute))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"layout: {name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if sorted(self.order.split("-")) != sorted(AXES):
            raise BadInput(
                f"layout: order must name {', '.join(AXES)} once each, like {DEFAULT_ORDER}, not {self.order!r}"
            )
        if self.shard and (self.zero == 0 or self.shard < 0 or self.dp % self.shard):
            raise BadInput(f"layout: shard={self.shard} needs zero >= 1 and must divide dp={self.dp}")
        data = self.dp * self.cp
        folds = self.ep // data  # experts on different tp ranks (arXiv 2504.14960)
        if data % self.ep and (self.ep % data or self.tp % folds):
            raise BadInput(
                f"layout: ep={self.ep} must divide dp*cp={data}, or be so many times a divisor of tp={self.tp}"
            )
        # One spelling per meaning: without tp there is nothing to cut, and all of dp is what 0 says.
        object.__setattr__(self, "sp", self.sp and self.tp > 1)
        object.__setattr__(self, "shard", 0 if self.shard == self.dp else self.shard)
        self._check_stages()

    def _check_stages(self) -> None:
        if self.schedule == "interleaved" and self.pp > 1 and self.vpp == 1:
            raise BadInput("layout: schedule=interleaved needs vpp of at least 2")
        if self.schedule == "zb-v" and self.vpp != 2 and self.num_stages > 1:
            raise BadInput(f"layout: schedule=zb-v places two stages on each rank: vpp must be 2, not {self.vpp}")
        if self.vpp > 1 and self.schedule not in ("interleaved", "zb-v"):
            raise BadInput(f"layout: vpp={self.vpp} needs schedule=interleaved or zb-v, not {self.schedule}")
        if self.cut and (len(self.cut) != self.num_stages or min(self.cut) < 1):
            raise BadInput(f"layout: cut must give each of {self.num_stages} stages at least 1 block, not {self.cut}")

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def num_stages(self) -> int:
        """Virtual stages of the whole pipeline."""
        return self.pp * self.vpp

    @property
    def shard_size(self) -> int:
        """Data-parallel ranks that ZeRO shards over; 1 without ZeRO."""
        return (self.shard or self.dp) if self.zero else 1

    def __str__(self) -> str:
        given = [f for f in fields(self) if f.name in ("tp", "pp", "dp", "mb") or getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={_to_text(getattr(self, f.name))}" for f in given)


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        runs = [(part, len(list(same))) for part, same in groupby(value)]
        return "+".join(f"{part}*{times}" if times > 2 else "+".join([str(part)] * times) for part, times in runs)
    return str(value)


def parse_layout(text: str) -> Layout:
    """Read `tp=8,pp=4,dp=2,mb=1`. Keys are the fields of `Layout`; order does not matter.

    Raises:
        BadInput: an unknown or repeated key, a value that is no number, or an impossible combination.
    """
    return Layout(**parse_fields(text))


def parse_fields(text: str) -> dict[str, Any]:
    """The fields that such a text names, and their values.

    Raises:
        BadInput: an unknown or repeated key, or a value that is no number.
    """
    hints = get_type_hints(Layout)
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, raw = (piece.strip() for piece in item.partition("="))
        if not equals or key not in hints:
            raise BadInput(f"layout: {item!r} is not KEY=VALUE with KEY one of {', '.join(hints)}")
        if key in values:
            raise BadInput(f"layout: {key} is given twice")
        values[key] = _from_text(key, raw, hints[key])
    return values


def _from_text(key: str, raw: str, kind: object) -> object:
    try:
        if kind is bool:
            return {"0": False, "1": True}[raw]
        if kind is int:
            return int(raw)
        if kind == tuple[int, ...]:
            parts = [part.split("*") for part in raw.split("+")]
            return tuple(int(part) for part, *times in parts for _ in range(_times(times)))
    except (KeyError, ValueError):
        wanted = {bool: "0 or 1", int: "a whole number"}.get(kind, "whole numbers joined by +, like 3+2*5")  # type: ignore[call-overload]
        raise BadInput(f"layout: {key}={raw!r} must be {wanted}") from None
    return raw


def _times(given: list[str]) -> int:
    """How often a part of a cut comes: `2*5` is five stages of 2 blocks."""
    times = int(given[0]) if given else 1
    if len(given) > 1 or not 1 <= times <= MAX_SIZE:
        raise ValueError
    return times


def micro_batches(layout: Layout, global_batch: int) -> int:
    """Micro-batches that each pipeline runs for one step.

    Raises:
        BadInput: the global batch is not a multiple of dp * mb.
    """
    per_round = layout.dp * layout.mb
    if global_batch % per_round or global_batch < per_round:
        near = max(1, round(global_batch / per_round)) * per_round
        raise BadInput(f"global batch {global_batch} is not a multiple of dp*mb={per_round}; nearest: {near}")
    return global_batch // per_round


def check_layout(layout: Layout, spec: ModelSpec, seq_len: int) -> None:
    """Refuse a layout that cannot carry this model, naming what would do.

    Raises:
        BadInput: heads, kv heads, ffn, layers or sequence that the layout cannot cut.
    """
    if not _carries(layout.tp, spec):
        valid = [tp for tp in range(1, spec.num_heads + 1) if _carries(tp, spec)]
        raise BadInput(
            f"tp={layout.tp} cannot cut {spec.name} ({spec.num_heads} heads, {spec.num_kv_heads} kv heads, ffn "
            f"{spec.ffn}); valid: {', '.join(map(str, valid))}"
        )
    if layout.sp and seq_len % layout.tp:
        raise BadInput(f"sequence parallelism needs a sequence length divisible by tp={layout.tp}, not {seq_len}")
    blocks = spec.num_layers + 2
    if layout.num_stages > blocks:
        raise BadInput(
            f"{layout.num_stages} stages are more than the {blocks} blocks (embedding, layers, head) of {spec.name}"
        )
    if layout.cut and sum(layout.cut) != blocks:
        raise BadInput(
            f"cut {_to_text(layout.cut)} covers {sum(layout.cut)} of {blocks} blocks (embedding, layers, head)"
        )


def _carries(tp: int, spec: ModelSpec) -> bool:
    """Heads and ffn are cut evenly; kv heads are cut evenly or each replicated on equally many ranks."""
    kv_heads_fit = spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0
    return spec.num_heads % tp == 0 and spec.ffn % tp == 0 and kv_heads_fit
