"""Service without chance in closed form: the steady state of one replica, a request alone, and a batch without queueing.

In the steady state n sequences run, of which each gives a token a round, and n / output_len prompts come to their end in
one. That fixes the mean step and so the round's seconds, the rate of requests (Little's law) and both latencies. It ranks
candidates and bounds them; the simulation decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triaxial.plan.serving.cost.step import StepCost
from triaxial.plan.serving.simulation.limits import Limits

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Steady:
    """Columns over the number of running sequences, as far as the limits go."""

    sequences: Floats
    rate: Floats
    """Requests per second."""
    ttft_s: Floats
    """Mean, with queueing for room in steps but not for a place in the batch."""
    tpot_s: Floats

    def fastest(self, ttft_s: float | None, tpot_s: float | None) -> tuple[float, float]:
        """The highest rate within the targets, and the sequences that then run; zeros if there is none."""
        good = (self.ttft_s <= (ttft_s or np.inf)) & (self.tpot_s <= (tpot_s or np.inf))
        if not good.any():
            return 0.0, 0.0
        best = int(np.argmax(np.where(good, self.rate, 0.0)))
        return float(self.rate[best]), float(self.sequences[best])

    def at_rate(self, rate: float) -> int | None:
        """The row in which so many requests come in a second; None if they are too many."""
        return int(np.argmax(self.rate >= rate)) if rate <= self.rate.max() else None


def steady(cost: StepCost, limits: Limits, input_len: float, output_len: float) -> Steady:
    """Price the steady state of every number of running sequences that the limits allow."""
    held = input_len + output_len / 2
    most = min(limits.max_batch, limits.kv_tokens / min(held, limits.window or held))
    n = np.unique(np.geomspace(1, max(most, 1), 40).round())
    groups = np.minimum(n, cost.pipeline_ranks)
    size = n / groups
    arriving = n / output_len / groups * input_len  # prompt tokens of a mean step
    piece = np.maximum(1, np.minimum(input_len, limits.chunk_tokens - size))  # of a prompt, what goes into a step
    share = np.minimum(1, arriving / piece)  # of the steps, those with prompts in them
    tokens = np.maximum(piece, arriving)  # prompt tokens of such a step
    plain = (0.0, 0.0, size, size * held)
    mixed = (tokens, tokens * input_len / 2, size, size * held, tokens / input_len)
    seconds, seconds_mixed = (np.asarray(cost.seconds(*step)) for step in (plain, mixed))
    interval, interval_mixed = (np.asarray(cost.interval_seconds(*step)) for step in (plain, mixed))
    any_mixed = 1 - (1 - share) ** groups  # steps keep their order: all of a round wait for its longest
    through = (1 - any_mixed) * seconds + any_mixed * seconds_mixed
    follows = (1 - share) * interval + share * interval_mixed
    tpot = np.maximum(through, groups * follows)
    room = np.maximum(1, limits.chunk_tokens - size)
    busy = np.minimum(arriving / room, 0.999)  # an M/D/1 queue of prompts for the room that decoding leaves in steps
    queueing = busy / (2 * (1 - busy)) * input_len / room * interval_mixed
    reading = seconds_mixed + (np.ceil(input_len / piece) - 1) * interval_mixed
    ttft = cost.host.request_s + interval / 2 + queueing + reading
    possible = arriving + size <= limits.chunk_tokens
    possible[0] = True
    columns = (n, n / (output_len * tpot), ttft, tpot)
    return Steady(*(column[possible] for column in columns))


def alone(cost: StepCost, chunks: Sequence[int], prompt: int, output: float) -> tuple[float, float]:
    """TTFT and TPOT of one request that has a replica to itself: no traffic makes either shorter.

    Args:
        chunks: tokens of a step to choose from; pieces of a prompt follow each other through a pipeline.
    """
    ttft = min(_prefill(cost, chunk, prompt) for chunk in chunks)
    return ttft + cost.host.request_s, float(cost.seconds(0.0, 0.0, 1.0, prompt + output / 2))


def _prefill(cost: StepCost, chunk: int, prompt: int) -> float:
    before = np.arange(0.0, prompt, chunk)
    tokens = np.minimum(chunk, prompt - before)
    pairs = tokens * before + tokens * (tokens + 1) / 2
    nothing, ends = np.zeros_like(before), (before + tokens == prompt).astype(float)
    follows = np.asarray(cost.interval_seconds(tokens, pairs, nothing, nothing, ends))
    return float(follows[:-1].sum()) + float(cost.seconds(tokens[-1], pairs[-1], 0.0, 0.0, 1.0))


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
