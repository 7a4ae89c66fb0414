"""`Training`: what one optimizer step must process, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from triaxial import BadInput

Precision = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]
Optimizer = Literal["adam", "sgd"]

MASTER_AND_MOMENTS_BYTES: dict[Optimizer, int] = {"adam": 12, "sgd": 8}
"""Optimizer state per parameter: an fp32 master copy plus fp32 moments (two for Adam, one for SGD with momentum)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training work of one step, whatever the layout."""

    global_batch: int
    """Sequences per optimizer step over all ranks."""
    seq_len: int
    """Tokens per sequence."""
    precision: Precision = "bf16"
    """Type of the matrix multiplications; 8- and 4-bit ones keep bf16 activations and parameters."""
    optimizer: Optimizer = "adam"

    def __post_init__(self) -> None:
        for name in ("global_batch", "seq_len"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name, allowed in (("precision", get_args(Precision)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.global_batch * self.seq_len

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation or parameter as the forward pass sees it."""
        return 4 if self.precision == "fp32" else 2

    @property
    def state_bytes(self) -> int:
        """Optimizer state per parameter in bytes; fp32 training needs no separate master copy."""
        return MASTER_AND_MOMENTS_BYTES[self.optimizer] - (4 if self.precision == "fp32" else 0)
