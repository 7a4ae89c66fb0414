"""`Candidate`: one way to cut a model over the GPUs of a replica; all that a cluster allows, and each in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.memory import ServingMemory, serving_memory
from triaxial.plan.serving.cost.step import StepCost, step_cost
from triaxial.plan.serving.demand import Demand, Objective
from triaxial.plan.serving.engine import Engine
from triaxial.plan.serving.search.closed_form import Steady, steady
from triaxial.plan.serving.simulation.clock import Clock
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.served import Served
from triaxial.plan.serving.simulation.simulate import simulate
from triaxial.plan.serving.traffic import Traffic
from triaxial.plan.serving.workload import Serving

MAX_BATCHES = (16, 32, 64, 128, 256, 512)
CHUNK_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Candidate:
    """Replicas of tp x pp GPUs; `layout` has as many as the cluster holds."""

    model: ModelSpec
    cluster: Cluster
    layout: Layout
    work: Serving
    cost: StepCost

    @property
    def replica_gpus(self) -> int:
        return self.layout.tp * self.layout.pp

    @property
    def most_replicas(self) -> int:
        return self.layout.dp

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.cost)

    def memory(self, max_batch: int, chunk_tokens: int) -> ServingMemory:
        work = replace(self.work, max_batch=max_batch, chunk_tokens=chunk_tokens)
        return serving_memory(self.model, self.cluster, self.layout, work, self.cost.engine)

    def limits(self, max_batch: int, chunk_tokens: int) -> Limits:
        memory = self.memory(max_batch, chunk_tokens)
        return Limits(
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            kv_tokens=memory.max_kv_tokens,
            window=memory.farthest_window,
        )

    def serve(self, traffic: Traffic, limits: Limits, replicas: int = 1) -> Served:
        return simulate(traffic, self.clock, limits, replicas=replicas)

    def holds(self, tokens: int) -> bool:
        """Whether the leanest replica has room for one request of so many tokens."""
        return self.largest_batch(CHUNK_TOKENS[0], tokens) is not None

    def largest_batch(self, chunk_tokens: int, tokens: int) -> int | None:
        """The largest limit of sequences beside which the cache has room for one request of so many tokens."""
        possible = (batch for batch in reversed(MAX_BATCHES) if batch <= chunk_tokens)
        return next((batch for batch in possible if self.limits(batch, chunk_tokens).kv_room >= tokens), None)


def candidates(model: ModelSpec, cluster: Cluster, work: Serving, engine: Engine) -> Iterator[Candidate]:
    """Every (tp, pp) that cuts the model and goes into the cluster."""
    for tp, pp in replica_sizes(model, cluster):
        layout = Layout(tp=tp, pp=pp, dp=cluster.num_gpus // (tp * pp))
        try:
            yield Candidate(model, cluster, layout, work, step_cost(model, cluster, layout, work, engine))
        except BadInput:  # heads or widths that tp does not cut
            continue


def replica_sizes(model: ModelSpec, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """(tp, pp); a pipeline with no smaller slowest stage than a shorter one is left out."""
    for tp in range(1, cluster.num_gpus + 1):
        if cluster.num_gpus % tp and cluster.gpus_per_node % tp:
            continue
        slowest = model.num_layers + 1
        for pp in range(1, min(cluster.num_gpus // tp, model.num_layers) + 1):
            if -(-model.num_layers // pp) < slowest:
                slowest = -(-model.num_layers // pp)
                yield tp, pp


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
