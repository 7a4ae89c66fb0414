"""`Option`: a candidate at work: the load that it takes within the targets, or the replicas that a load needs, by simulation,
and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from triaxial.plan.layout import Layout
from triaxial.plan.serving.demand import Demand, Objective
from triaxial.plan.serving.search.candidates import Candidate, Screened
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.served import Served
from triaxial.plan.serving.traffic import at_once


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


RATE_PRECISION = 1.03
"""The highest rate within the targets is known to this factor."""
OF_CLOSED_FORM = 0.87
"""Of the rate that the steady state promises, about what a simulation of chance arrivals holds: where to look first."""
MOST_REPLICAS = 2
"""Replicas that are simulated of equal ones: requests choose the idler one, and each gets enough of them."""
ALONE_REQUESTS = 32
"""Requests that are simulated one after the other for the latency of a quiet deployment."""


def operate(screened: Screened, demand: Demand, objective: Objective, to_beat: float = math.inf) -> Option | None:
    """The candidate where it serves the objective best.

    Args:
        to_beat: a score beyond which nobody is interested.

    Returns: None if it cannot meet the demand, or not beat `to_beat`.
    """
    most = screened.candidate.most_replicas
    rate = demand.rate
    served: Served | None
    if rate is not None:
        if objective != "latency" and screened.score > to_beat:
            return None
        replicas = most if objective == "latency" else fewest_replicas(screened, demand)
        served, rate = _under(screened, demand, replicas) if replicas else (None, rate)
    elif objective in ("latency", "gpus"):
        replicas = most if objective == "latency" else 1
        served = screened.candidate.serve(demand.one_at_a_time(ALONE_REQUESTS), screened.limits)
    elif demand.has_target:
        replicas = most
        served, rate = _most(screened, demand, to_beat)
    else:
        replicas = most
        load = demand.arriving(screened.rate, screened.sequences)
        served = screened.candidate.serve(at_once(load.input_tokens, load.output_tokens), screened.limits)
    if served is None or not demand.met_by(served):
        return None
    return Option(screened.candidate, screened.limits, replicas, demand, served, rate)


def fewest_replicas(screened: Screened, demand: Demand) -> int:
    """Replicas that serve the demand's rate within its targets; 0 if all that the cluster holds do not.

    More replicas are never worse but for chance, so their number is found by doubling steps and then halving.
    """
    assert demand.rate is not None
    most = screened.candidate.most_replicas
    guess = math.ceil(demand.rate / (OF_CLOSED_FORM * screened.rate)) if screened.rate else most
    low, high = 0, most + 1  # not enough; enough
    step, tried = 1, min(most, guess)
    while high - low > 1:
        if demand.met_by(_under(screened, demand, tried)[0]):
            high, tried = tried, tried - step
        else:
            low, tried = tried, tried + step
        step *= 2
        if not low < tried < high:
            tried = (low + high) // 2
    return high if high <= most else 0


def carried_rate(option: Option) -> float:
    """The highest rate that an option's replicas serve within the targets."""
    demand, replicas = option.demand, len(option.served.replicas)
    assert option.rate is not None
    inside = option.rate * option.latency_s

    def met(rate: float) -> bool:
        return demand.met_by(option.candidate.serve(demand.arriving(rate, inside), option.limits, replicas))

    return highest(met, option.rate) * option.replicas / replicas


def _most(screened: Screened, demand: Demand, to_beat: float) -> tuple[Served | None, float]:
    """One replica under the highest rate within the targets, and that rate."""
    best: tuple[Served | None, float] = None, 0.0

    def met(rate: float) -> bool:
        nonlocal best
        served = screened.candidate.serve(demand.arriving(rate, screened.sequences), screened.limits)
        good = demand.met_by(served)
        if good and rate > best[1]:
            best = served, rate
        return good

    if to_beat == math.inf or met(screened.candidate.replica_gpus / to_beat):
        highest(met, OF_CLOSED_FORM * screened.rate)
    return best


def highest(met: Callable[[float], bool], guess: float) -> float:
    """The highest value at which `met` still holds, to `RATE_PRECISION`; 0 if it holds nowhere near the guess.

    From the guess it goes on by ever longer steps until it is passed, then the interval is halved.
    """
    low, high, value, factor = 0.0, math.inf, guess, 1.15
    while value > guess / 32 and (low == 0 or high / low > RATE_PRECISION):
        if met(value):
            low = value
        else:
            high = value
        if low == 0 or high == math.inf:
            value = value * factor if high == math.inf else value / factor
            factor **= 1.5
        else:
            value = math.sqrt(low * high)
    return low


def _under(screened: Screened, demand: Demand, replicas: int) -> tuple[Served, float]:
    """The demand's rate on so many replicas. Of equal ones under chance arrivals only some are simulated, with their
    share of the rate, which is returned too; a recorded trace goes to all of them as it came."""
    assert demand.rate is not None
    simulated = replicas if demand.recorded else min(replicas, MOST_REPLICAS)
    rate = demand.rate * simulated / replicas
    traffic = demand.arriving(rate, screened.sequences * simulated)
    return screened.candidate.serve(traffic, screened.limits, simulated), rate
