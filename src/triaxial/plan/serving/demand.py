"""`Demand`: the traffic that a deployment must serve, and how well; made of what a user gave in numbers or in files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.plan.serving.simulation.served import Served
from triaxial.plan.serving.traces import read_lengths, read_trace
from triaxial.plan.serving.traffic import Traffic, closed_loop, draw_lengths, parse_lengths, poisson
from triaxial.plan.serving.workload import Serving

Objective = Literal["latency", "throughput", "gpus", "cost"]
"""Shortest mean latency of a request; most output tokens per GPU; fewest GPUs; least money per token (with one price for
every GPU-hour, and a given rate, that is the fewest GPUs; without a rate it is the highest throughput per GPU)."""

TARGET_PERCENTILE = 90
"""Of the requests, those that must meet each target (as in DistServe, arXiv 2401.09670)."""

TURNOVERS = 6
"""Times that all requests inside are replaced in a simulation: before the first, it is less loaded than it will be."""


@dataclass(frozen=True)
class Demand:
    """What is asked of a deployment."""

    traffic: Traffic
    """The requests; they come at `rate`, or where there is none at any rate that a search tries."""
    rate: float | None
    """Requests per second over all replicas; None: as many as the deployment can take."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    recorded: bool = False
    """The arrivals are a trace's, not chance ones: no part of the deployment sees the same in small."""

    @property
    def has_target(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    @property
    def mean_input(self) -> float:
        return float(self.traffic.input_tokens.mean())

    @property
    def mean_output(self) -> float:
        return float(self.traffic.output_tokens.mean())

    @property
    def long_input(self) -> int:
        """The prompt than which no more than the requests that may miss a target have longer ones."""
        return int(np.percentile(self.traffic.input_tokens, TARGET_PERCENTILE, method="lower"))

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return int((self.traffic.input_tokens + self.traffic.output_tokens).max())

    def arriving(self, rate: float, inside: float) -> Traffic:
        """The requests at some rate; chance arrivals go on until the deployment, which then has so many inside, has
        been emptied and filled often enough."""
        traffic = self.traffic if self.recorded else self.traffic.at_least(math.ceil(TURNOVERS * inside))
        return traffic.at_rate(rate)

    def one_at_a_time(self, count: int) -> Traffic:
        part = self.traffic.first(count)
        return closed_loop(part.input_tokens, part.output_tokens, 1)

    def times(self, rate: float = 1.0, input: float = 1.0, output: float = 1.0) -> Demand:
        """The same demand with so many times the rate, or the tokens."""
        inputs, outputs = (
            np.maximum(1, np.rint(tokens * factor)).astype(np.int64)
            for tokens, factor in ((self.traffic.input_tokens, input), (self.traffic.output_tokens, output))
        )
        traffic = replace(
            self.traffic, arrival_s=self.traffic.arrival_s / rate, input_tokens=inputs, output_tokens=outputs
        )
        return replace(self, traffic=traffic, rate=None if self.rate is None else self.rate * rate)

    def met(self, ttft_s: float, tpot_s: float) -> bool:
        return ttft_s <= (self.ttft_s or np.inf) and tpot_s <= (self.tpot_s or np.inf)

    def met_by(self, served: Served) -> bool:
        """Whether enough requests met each target, and, where nothing limits waiting, the queue does not grow."""
        ttft, tpot = served.at_percentile(TARGET_PERCENTILE)
        return self.met(ttft, tpot) and (self.ttft_s is not None or not served.backlog_grows)


def demand_for(
    *,
    input_len: str | None = None,
    output_len: str | None = None,
    lengths: Path | None = None,
    trace: Path | None = None,
    rate: float | None = None,
    requests: int = 1000,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
) -> Demand:
    """Make the demand of one of: a trace, a file of lengths, or lengths of prompts and of answers.

    Args:
        rate: requests per second; None is that of the trace, or without one as many as can be served.
        requests: how many to simulate; of a trace the first.

    Raises:
        BadInput: none or several of the three, a rate or target that is not positive, or a file that cannot be read.
    """
    for name, value in (("rate", rate), ("ttft", ttft_s), ("tpot", tpot_s)):
        if value is not None and not 0 < value < float("inf"):
            raise BadInput(f"--{name} must be more than zero, not {value}")
    given = [trace is not None, lengths is not None, input_len is not None or output_len is not None]
    if sum(given) != 1:
        raise BadInput("say how long requests are, in one way: --input and --output, --lengths FILE, or --trace FILE")
    if trace is not None:
        traffic = read_trace(trace).first(requests)
        if traffic.rate is None:
            raise BadInput(f"{trace}: all requests arrive at once, which is no rate: give --lengths and --rate instead")
        return Demand(traffic.at_rate(rate) if rate else traffic, rate or traffic.rate, ttft_s, tpot_s, recorded=True)
    if lengths is not None:
        inputs, outputs = read_lengths(lengths, requests)
    elif input_len is None or output_len is None:
        raise BadInput(f"--{'input' if input_len is None else 'output'} is missing: give both lengths")
    else:
        both = parse_lengths("input", input_len), parse_lengths("output", output_len)
        inputs, outputs = draw_lengths(*both, requests)
    return Demand(poisson(inputs, outputs, rate or 1.0), rate, ttft_s, tpot_s)


def serving_work(demand: Demand, precision: str, kv_precision: str) -> Serving:
    """The same in means, as the cost of a step and the memory are asked for.

    Raises:
        BadInput: an unknown precision.
    """
    return Serving(
        input_len=max(1, round(demand.mean_input)),
        output_len=max(1, round(demand.mean_output)),
        precision=precision,  # type: ignore[arg-type]  # checked there
        kv_precision=kv_precision,  # type: ignore[arg-type]
        rate=demand.rate,
        ttft_s=demand.ttft_s,
        tpot_s=demand.tpot_s,
    )


def with_price(cluster: Cluster, price_per_gpu_hour: float | None) -> Cluster:
    """Raises BadInput for a price that is not positive."""
    if price_per_gpu_hour is None:
        return cluster
    if not 0 < price_per_gpu_hour < float("inf"):
        raise BadInput(f"--price must be more than zero, not {price_per_gpu_hour}")
    return cluster.model_copy(update={"gpu_price_per_hour": price_per_gpu_hour})
