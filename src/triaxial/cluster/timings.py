"""What a probe has measured, point by point. Where a cluster has such points, predictions interpolate between them."""

from __future__ import annotations

from collections.abc import Mapping
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


class PassTiming(_Frozen):
    """Memory-bound passes of a layer, a line over the bytes that the planner counts for them. A runtime without fused
    kernels moves more than these, and not alike in both directions."""

    launch_s: NonNegativeFloat
    """Seconds of each pass however little it moves."""
    bytes_per_s: PositiveFloat


class ProductTiming(_Frozen):
    """Products of so many rows with weights that come from memory: a line over the elements of the weight."""

    rows: PositiveInt
    call_s: NonNegativeFloat
    weights_per_s: PositiveFloat


class EngineRates(_Frozen):
    """What a rank of Triaxial's own engine does in one precision."""

    products: tuple[ProductTiming, ...] = Field(min_length=1)
    """By rows, ascending."""
    attention_flop_per_s: PositiveFloat
    """Of a prompt's attention."""
    kv_bytes_per_s: PositiveFloat
    """Of keys and values that decoding reads."""
    pass_launch_s: NonNegativeFloat
    pass_bytes_per_s: PositiveFloat


class ServerTimings(_Frozen):
    """Seconds of a processor that HTTP, and tokens from and to text, take beside an engine's steps."""

    request_s: NonNegativeFloat
    """Of a request, up to its first token."""
    step_s: NonNegativeFloat
    """Once a step whose tokens are passed on; the next for each of them."""
    sequence_s: NonNegativeFloat

    def beyond(self, step_s: float, sequence_s: float) -> ServerTimings:
        """Without what counts elsewhere."""
        return ServerTimings(
            request_s=self.request_s,
            step_s=max(0.0, self.step_s - step_s),
            sequence_s=max(0.0, self.sequence_s - sequence_s),
        )


class EngineTimings(_Frozen):
    """What a step of Triaxial's own engine takes."""

    rates: dict[str, EngineRates]
    """By precision."""
    stage_s: NonNegativeFloat = 0.0
    """Seconds of every pipeline stage beside its blocks."""
    step_s: NonNegativeFloat = 0.0
    """Seconds of the host once a step; the next for each sequence in it."""
    sequence_s: NonNegativeFloat = 0.0
    server: ServerTimings | None = None
    """Where it is installed."""

    def rates_in(self, precision: str) -> EngineRates:
        """Rates in a precision.

        Raises:
            BadInput: it was not probed.
        """
        return _in(self.rates, precision)


class DeviceTimings(_Frozen):
    """Points of one device, per precision, with all devices of its node at work."""

    gemm: dict[str, tuple[GemmTiming, ...]] = Field(min_length=1)
    attention: dict[str, tuple[AttentionTiming, ...]] = Field(min_length=1)
    forward_passes: dict[str, PassTiming]
    backward_passes: dict[str, PassTiming]
    step_s: NonNegativeFloat
    """Seconds of a training step outside the model."""
    token_s: NonNegativeFloat = 0.0
    """Seconds to read a training token from its memory map."""
    reserve_bytes: NonNegativeFloat
    """What a process holds before its first tensor."""
    ranks_per_processor: PositiveFloat = 1.0
    """Devices that stand on one processor and share it: what one leaves idle, another uses."""
    engine: EngineTimings | None = None
    """Of Triaxial's own engine, which runs operations of its own."""

    def gemm_in(self, precision: str) -> tuple[GemmTiming, ...]:
        """Matrix products in a precision.

        Raises:
            BadInput: it was not probed.
        """
        return _in(self.gemm, precision)

    def passes_in(self, precision: str, *, backward: bool) -> PassTiming:
        """Memory-bound passes in a precision.

        Raises:
            BadInput: it was not probed.
        """
        return _in(self.backward_passes if backward else self.forward_passes, precision)

    def attention_in(self, precision: str) -> tuple[AttentionTiming, ...]:
        """Attention in a precision.

        Raises:
            BadInput: it was not probed.
        """
        return _in(self.attention, precision)


def _in(points: Mapping[str, T], precision: str) -> T:
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
