"""`Serving`: the requests that a deployment must answer, and how well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from triaxial import BadInput

WeightPrecision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4"]
"""How matrices are stored. fp8, int8 and fp4 also multiply in that type where the device can; int4 is weight-only."""
KVPrecision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]

STORED_BYTES: dict[WeightPrecision, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5 + 2 / 128,  # a 16-bit scale for every 128 (arXiv 2306.00978, 2210.17323: groups of 128)
    "fp4": 0.5 + 1 / 16,  # an 8-bit scale for every 16 (NVFP4)
}
"""Bytes of a weight in memory, with its share of the scales."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The serving work of one deployment, whatever the layout."""

    input_len: int
    """Tokens of a prompt (the mean, where lengths vary)."""
    output_len: int
    """Tokens generated for a request."""
    precision: WeightPrecision = "bf16"
    kv_precision: KVPrecision = "bf16"
    rate: float | None = None
    """Requests per second that arrive on average; None: `concurrency` requests are always there."""
    concurrency: int = 1
    """Requests in flight at any time, over all replicas, where no rate is given."""
    ttft_s: float | None = None
    """Target: seconds to the first token."""
    tpot_s: float | None = None
    """Target: seconds per output token after the first."""
    max_batch: int = 256
    """Sequences that one replica runs at a time, where memory holds them."""
    chunk_tokens: int = 8192
    """Tokens that one step may process; longer prompts are cut."""

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "concurrency", "max_batch", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("rate", "ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name.removesuffix('_s')} must be more than zero, not {value}")
        for name, allowed in (("precision", get_args(WeightPrecision)), ("kv_precision", get_args(KVPrecision))):
            if getattr(self, name) not in allowed:
                option = name.replace("_", "-")
                raise BadInput(f"{option} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
