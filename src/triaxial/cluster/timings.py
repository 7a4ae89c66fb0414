"""What a probe has measured, point by point. Where a cluster has such points, predictions interpolate between them."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from triaxial import BadInput

T = TypeVar("T")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GemmTiming(_Frozen):
    """One matrix product (m, k) x (k, n)."""

    m: PositiveInt
    n: PositiveInt
    k: PositiveInt
    seconds: PositiveFloat


class AttentionTiming(_Frozen):
    """Causal self-attention of `sequences` x `heads` over `length` tokens each."""

    sequences: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    length: PositiveInt
    head_dim: PositiveInt
    forward_s: PositiveFloat
    backward_s: PositiveFloat


class DeviceTimings(_Frozen):
    """Points of one device, per precision, with all devices of its node at work."""

    gemm: dict[str, tuple[GemmTiming, ...]] = Field(min_length=1)
    attention: dict[str, tuple[AttentionTiming, ...]] = Field(min_length=1)
    pass_bytes_per_s: dict[str, PositiveFloat]
    """Rate of a layer's memory-bound passes, over the bytes that the planner counts for them."""
    pass_launch_s: dict[str, NonNegativeFloat]
    """Seconds of each of these passes however little it moves."""
    step_s: NonNegativeFloat
    """Seconds of a training step outside the model."""
    reserve_bytes: NonNegativeFloat
    """What a process holds before its first tensor."""
    ranks_per_processor: PositiveFloat = 1.0
    """Devices that stand on one processor and share it: what one leaves idle, another uses."""

    def gemm_in(self, precision: str) -> tuple[GemmTiming, ...]:
        """Matrix products in a precision.

        Raises:
            BadInput: it was not probed.
        """
        return self._in(self.gemm, precision)

    def attention_in(self, precision: str) -> tuple[AttentionTiming, ...]:
        """Attention in a precision.

        Raises:
            BadInput: it was not probed.
        """
        return self._in(self.attention, precision)

    def _in(self, points: dict[str, tuple[T, ...]], precision: str) -> tuple[T, ...]:
        if precision not in points:
            raise BadInput(f"the cluster was not probed in {precision}, only in {', '.join(points)}")
        return points[precision]


class CollectiveTimings(_Frozen):
    """One kind of collective over groups that lie on the tiers in one way (`plan.cost.collectives.Group`)."""

    kind: str
    members: tuple[PositiveInt, ...]
    sharing: tuple[PositiveFloat, ...]
    bytes: tuple[PositiveInt, ...] = Field(min_length=1)
    """Sizes, ascending."""
    seconds: tuple[PositiveFloat, ...] = Field(min_length=1)

    def crosses(self, tier: int) -> bool:
        """Whether its messages pass the links of a tier."""
        return self.members[tier] > (self.members[tier - 1] if tier else 1)

    def with_bandwidth(self, factor: float) -> CollectiveTimings:
        """The same over links of another rate: what the smallest message takes is latency and stays."""
        least = self.seconds[0]
        return self.model_copy(update={"seconds": tuple(least + (s - least) / factor for s in self.seconds)})
