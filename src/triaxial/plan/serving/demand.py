"""`Demand`: the traffic that a deployment must serve, and how well."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from triaxial.plan.serving.served import Served
from triaxial.plan.serving.traffic import Traffic, closed_loop

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
