"""`Candidate`: one way to cut a model over the GPUs of a replica, and all of them that a cluster allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.clock import Clock
from triaxial.plan.serving.engine import Engine
from triaxial.plan.serving.limits import Limits
from triaxial.plan.serving.memory import ServingMemory, serving_memory
from triaxial.plan.serving.served import Served
from triaxial.plan.serving.simulate import simulate
from triaxial.plan.serving.step import StepCost, step_cost
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
        kv_tokens = self.memory(max_batch, chunk_tokens).max_kv_tokens
        return Limits(max_batch=max_batch, chunk_tokens=chunk_tokens, kv_tokens=kv_tokens)

    def serve(self, traffic: Traffic, limits: Limits, replicas: int = 1) -> Served:
        """Simulate, as clients see it."""
        served = simulate(traffic, self.clock, limits, replicas=replicas)
        return replace(served, request_s=self.cost.host.request_s)

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
