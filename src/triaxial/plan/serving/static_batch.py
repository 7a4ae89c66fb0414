"""A batch of equal requests that is prefilled at once and decoded to its end: offline work without queueing."""

from __future__ import annotations

from dataclasses import dataclass

from triaxial.plan.serving.step import StepCost


@dataclass(frozen=True)
class BatchTimes:
    """Seconds of one batch."""

    ttft_s: float
    """Until all first tokens are out."""
    decode_s: float
    """All later tokens."""

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s


def static_batch(cost: StepCost, sequences: int, input_len: int, output_len: int) -> BatchTimes:
    """Seconds of `sequences` equal requests on one replica.

    A pipeline takes the batch in equal parts, one behind the other (`Engine.pipeline_parts`).
    """
    parts = cost.engine.pipeline_parts(sequences, input_len, cost.pipeline_ranks)
    part = sequences / parts
    prompt = (part * input_len, part * input_len * (input_len + 1) / 2, 0.0, 0.0, part)
    ttft = float(cost.seconds(*prompt)) + (parts - 1) * float(cost.interval_seconds(*prompt))
    steps = max(output_len - 1, 0)
    parts = cost.engine.pipeline_parts(sequences, 1, cost.pipeline_ranks)
    part = sequences / parts
    # seconds are a line in the context, so the mean context gives the mean step
    mean = (0.0, 0.0, part, part * (input_len + output_len / 2), 0.0)
    step = float(cost.seconds(*mean)) + (parts - 1) * float(cost.interval_seconds(*mean))
    return BatchTimes(ttft, steps * step)
