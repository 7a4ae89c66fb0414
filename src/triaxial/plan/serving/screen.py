"""Candidates in closed form: the limits that suit each one, and how good it then is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from triaxial.plan.serving.candidates import CHUNK_TOKENS, MAX_BATCHES, Candidate
from triaxial.plan.serving.demand import Demand
from triaxial.plan.serving.limits import Limits
from triaxial.plan.serving.option import Objective
from triaxial.plan.serving.steady import Steady, steady


@dataclass(frozen=True)
class Screened:
    """A candidate in its steady state."""

    candidate: Candidate
    limits: Limits
    table: Steady
    score: float
    """The objective: less is better, infinite if it cannot be met."""
    rate: float
    """Requests per second of one replica at most, within the targets."""
    sequences: float
    """That then run."""


def screen(candidate: Candidate, demand: Demand, objective: Objective) -> Screened:
    """The limits under which the steady state is best, and how good that is."""
    return min((screen_at(candidate, demand, objective, chunk) for chunk in CHUNK_TOKENS), key=lambda s: s.score)


def screen_at(candidate: Candidate, demand: Demand, objective: Objective, chunk: int) -> Screened:
    """The same with so many tokens in a step."""
    largest = candidate.largest_batch(chunk, demand.longest)
    limits = candidate.limits(largest or MAX_BATCHES[0], chunk)
    table = steady(candidate.cost, limits, demand.mean_input, demand.mean_output)
    rate, sequences = table.fastest(demand.ttft_s, demand.tpot_s)
    gpus, replicas = candidate.replica_gpus, candidate.most_replicas
    if objective == "latency" or (objective == "gpus" and demand.rate is None):
        row = table.at_rate((demand.rate or 0.0) / replicas)
        latency = math.inf if row is None else table.ttft_s[row] + demand.mean_output * table.tpot_s[row]
        sequences = sequences if row is None else table.sequences[row]
        score = latency if objective == "latency" else gpus
    elif demand.rate is None:
        score = gpus / rate if rate else math.inf
    else:
        score = demand.rate / rate * gpus if rate else math.inf
    if largest is None:
        score = math.inf
    batch = _batch_for(sequences, limits.max_batch)
    return Screened(candidate, candidate.limits(batch, chunk), table, float(score), rate, float(sequences))


def _batch_for(sequences: float, most: int) -> int:
    """Room for as many as run on average, and half as many again for when more come at once."""
    return next((batch for batch in MAX_BATCHES if 1.5 * sequences <= batch <= most), most)
