"""`Option`: one deployment, what it does with the demand, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from triaxial.plan.layout import Layout
from triaxial.plan.serving.candidates import Candidate
from triaxial.plan.serving.demand import Demand
from triaxial.plan.serving.limits import Limits
from triaxial.plan.serving.served import Served

Objective = Literal["latency", "throughput", "gpus", "cost"]
"""Shortest mean latency of a request; most output tokens per GPU; fewest GPUs; least money per token (with one price for
every GPU-hour, and a given rate, that is the fewest GPUs; without a rate it is the highest throughput per GPU)."""


@dataclass(frozen=True)
class Option:
    """Replicas of a candidate under limits, with their simulation."""

    candidate: Candidate
    limits: Limits
    replicas: int
    demand: Demand
    served: Served
    """By as many replicas as were simulated: all of them, or one of equal ones that share the load equally."""
    rate: float | None = None
    """Requests per second that came to the simulated replicas, which kept up with them; None: the next came when one
    was answered, or all came at once."""

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.candidate.layout.tp, pp=self.candidate.layout.pp, dp=self.replicas)

    @property
    def gpus(self) -> int:
        return self.candidate.replica_gpus * self.replicas

    @property
    def _equal_parts(self) -> float:
        return self.replicas / len(self.served.replicas)

    @property
    def output_tokens_per_s(self) -> float:
        return self.requests_per_s * float(self.served.output_tokens.mean())

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.output_tokens_per_s / self.gpus

    @property
    def requests_per_s(self) -> float:
        return (self.rate or self.served.requests_per_s) * self._equal_parts

    @cached_property
    def latency_s(self) -> float:
        """Mean over the requests, from arrival to the last token."""
        return float(self.served.latency_s.mean())

    def score(self, objective: Objective) -> tuple[float, float]:
        """Less is better; of equal ones, the one that answers sooner."""
        if objective == "latency":
            return self.latency_s, float(self.gpus)
        if objective == "gpus" or self.demand.rate is not None:
            return float(self.gpus), self.latency_s
        return self.gpus / self.requests_per_s, self.latency_s

    def cost_per_million_tokens(self, price_per_gpu_hour: float) -> float:
        """Money for a million output tokens."""
        return price_per_gpu_hour * self.gpus / 3600 / self.output_tokens_per_s * 1e6

    def to_dict(self) -> dict[str, Any]:
        """The option as JSON values."""
        memory = self.candidate.memory(self.limits.max_batch, self.limits.chunk_tokens)
        ttft, tpot = self.served.at_percentile(50)
        good = self.served.within(self.demand.ttft_s, self.demand.tpot_s)
        price = self.candidate.cluster.gpu_price_per_hour
        millions_per_hour = self.output_tokens_per_s * 3600 / 1e6
        return {
            "layout": str(self.layout),
            "gpus": self.gpus,
            "replicas": self.replicas,
            "max_batch": self.limits.max_batch,
            "chunk_tokens": self.limits.chunk_tokens,
            "ttft_s": ttft,
            "tpot_s": tpot,
            "percentiles": self.served.percentiles(),
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "goodput_requests_per_s": self.requests_per_s * float(good.mean()),
            "queueing_share": self.served.queueing_share,
            "utilisation": self.served.utilisation,
            "decode_batch": self.served.decode_batch,
            "preemptions": self.served.totals.preemptions,
            "gpu_hours_per_million_tokens": self.gpus / millions_per_hour,
            "cost_per_million_tokens": self.cost_per_million_tokens(price) if price else None,
            "fits": True,
            "memory_gib": {
                "peak": (
                    memory.weights_bytes + memory.workspace_bytes + self.limits.kv_tokens * memory.kv_bytes_per_token
                )
                / 2**30,
                "weights": memory.weights_bytes / 2**30,
                "kv_cache": self.limits.kv_tokens * memory.kv_bytes_per_token / 2**30,
                "workspace": memory.workspace_bytes / 2**30,
            },
        }
