"""The engine's own scheduler driven token by token by a clock that is only counted: what the simulator must agree with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from triaxial.plan.serving.simulation.clock import CostOfStep
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.traffic import Traffic
from triaxial.serve import batching
from triaxial.serve.blocks import BlockPool
from triaxial.serve.request import Request, Sampling


@dataclass
class ToyCost:
    """Affine in everything, with figures in which no two sums are equal by accident."""

    pipeline_ranks: int = 1
    fixed: float = 5e-3
    token: float = 2e-5
    pair: float = 1e-9
    held: float = 4e-8
    end: float = 1e-6
    request_s: float = 0.0
    uneven: float = 0.0

    def seconds(
        self, prefill_tokens: float, pairs: float, sequences: float, context: float, ending: float = 0.0, /
    ) -> float:
        tokens = prefill_tokens + sequences
        return self.fixed + self.token * tokens + self.pair * pairs + self.held * context + self.end * ending

    def interval_seconds(
        self, prefill_tokens: float, pairs: float, sequences: float, context: float, ending: float = 0.0, /
    ) -> float:
        whole = self.seconds(prefill_tokens, pairs, sequences, context, ending)
        return whole / self.pipeline_ranks


@dataclass
class Stepped:
    """What became of every request, by number, and every step: (decoding requests, (request, tokens) of prompts)."""

    first_token: list[float]
    last_token: list[float]
    steps: list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = field(default_factory=list)
    preemptions: int = 0


def serve_stepwise(traffic: Traffic, cost: CostOfStep, limits: Limits) -> Stepped:
    """Serve on one replica of the engine."""
    pool = BlockPool(limits.kv_blocks, limits.block_tokens, limits.max_batch)
    sizes = batching.Limits(cost.pipeline_ranks, limits.max_batch, limits.chunk_tokens, limits.window)
    scheduler = batching.Scheduler(pool, sizes)
    count = len(traffic)
    arrivals = traffic.arrival_s.tolist()
    sequences: list[batching.Running] = []
    found = Stepped([math.nan] * count, [math.nan] * count)
    flights: deque[tuple[float, int]] = deque()
    entry_free = last_end = -math.inf
    answered = 0
    while answered < count:
        arrival = arrivals[len(sequences)] if len(sequences) < count else math.inf
        now = min(arrival, flights[0][0] if flights else math.inf)
        while len(sequences) < count and arrivals[len(sequences)] <= now:
            number = len(sequences)
            prompt, output = int(traffic.input_tokens[number]), int(traffic.output_tokens[number])
            request = Request(str(number), (0,) * prompt, Sampling(max_tokens=output))
            sequences.append(scheduler.add(request, seed=0))
        while flights and flights[0][0] <= now:
            for part in scheduler.complete(flights.popleft()[1]):
                if part.void or not part.samples:
                    continue
                sequence, number = part.sequence, int(part.sequence.request.id)
                sequence.tokens.append(0)
                if sequence.given == 1:
                    found.first_token[number] = now
                if sequence.given == sequence.request.sampling.max_tokens:
                    found.last_token[number] = now
                    scheduler.remove(sequence)
                    answered += 1
        while step := scheduler.next_step():
            by_slot = {sequence.slot: sequence for sequence in sequences if sequence.slot is not None}
            decoding, prompts, context, pairs, ending = [], [], 0, 0, 0
            for entry in step.entries:
                sequence, tokens = by_slot[entry.slot], len(entry.tokens)
                if entry.first >= len(sequence.request.prompt) and len(sequence.tokens) - entry.first == 1:
                    decoding.append(int(sequence.request.id))
                    context += entry.first + 1
                else:
                    prompts.append((int(sequence.request.id), tokens))
                    pairs += tokens * entry.first + tokens * (tokens + 1) // 2
                    ending += entry.sample
            prefill = sum(tokens for _, tokens in prompts)
            figures = (prefill, pairs, len(decoding), context, ending)
            start, interval = max(now, entry_free), cost.interval_seconds(*figures)
            last_end = max(start + cost.seconds(*figures), last_end + interval)
            entry_free = start + interval
            flights.append((last_end, step.number))
            found.steps.append((tuple(decoding), tuple(prompts)))
    found.preemptions = scheduler.preemptions
    return found
