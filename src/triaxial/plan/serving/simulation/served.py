"""What a simulation keeps of requests and steps, and what that is in the words of service: TTFT, TPOT, goodput."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass
class Life:
    """One request in one replica. Times are in seconds."""

    arrival: float
    prompt: int
    output: int
    begun: float = math.nan
    """When it was first put into a step."""
    first_token: float = math.nan
    last_token: float = math.nan
    given: int = 0
    """Tokens that it had given when it last joined or left a group."""
    computed: int = 0
    """Tokens of its prompt that have been put into steps."""
    dropped: int = 0
    """Blocks that its prompt has given back, because no window reaches them any more."""
    restarts: int = 0

    @property
    def prefill(self) -> int:
        """Tokens to compute before the next can be given: after a preemption those given count too."""
        return self.prompt + self.given


@dataclass(frozen=True)
class Step:
    """What a step held, or each of `steps` equal ones in a row."""

    start: float
    end: float
    steps: int
    decoding: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]
    """(request, tokens)"""


@dataclass
class Totals:
    """Sums over the steps of one replica."""

    decode_steps: int = 0
    """Steps in which anything decodes."""
    decoded: int = 0
    """Tokens that decoding sequences gave."""
    decode_context: int = 0
    """Tokens that they held, summed over them and over the steps."""
    prompts: int = 0
    """Prompts that came to their end."""
    prompt_tokens: int = 0
    busy_s: float = 0.0
    """Seconds of the slowest stage."""
    preemptions: int = 0


Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Served:
    """Requests that were answered, as columns in the order of their arrival. Times in seconds since the first came."""

    arrival_s: Floats
    begun_s: Floats
    """When it was first put into a step; until then it queued."""
    first_token_s: Floats
    last_token_s: Floats
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    replicas: tuple[Totals, ...]
    request_s: float
    """What a request takes outside the engine, on its way in and out: part of its latency and of its first token's."""

    @property
    def ttft_s(self) -> Floats:
        """Time to the first token."""
        return self.first_token_s - self.arrival_s + self.request_s

    @property
    def tpot_s(self) -> Floats:
        """Time per output token after the first; not a number for requests that have only one."""
        with np.errstate(invalid="ignore"):
            rest: Floats = (self.last_token_s - self.first_token_s) / np.where(
                self.output_tokens > 1, self.output_tokens - 1, np.nan
            )
        return rest

    @property
    def latency_s(self) -> Floats:
        """From arrival to the last token."""
        return self.last_token_s - self.arrival_s + self.request_s

    @property
    def seconds(self) -> float:
        """From the first arrival to the last answer."""
        return float(self.last_token_s.max() - self.arrival_s[0])

    @property
    def output_tokens_per_s(self) -> float:
        return float(self.output_tokens.sum()) / self.seconds

    @property
    def requests_per_s(self) -> float:
        return len(self.arrival_s) / self.seconds

    @property
    def queueing_share(self) -> float:
        """Of all requests' latency, what they waited before their first step."""
        return float((self.begun_s - self.arrival_s).sum() / self.latency_s.sum())

    @property
    def utilisation(self) -> float:
        """Share of the time in which a replica's slowest stage works."""
        return self.totals.busy_s / (len(self.replicas) * self.seconds)

    @property
    def totals(self) -> Totals:
        """Of all replicas together."""
        return Totals(**{f.name: sum(getattr(totals, f.name) for totals in self.replicas) for f in fields(Totals)})

    @property
    def decode_batch(self) -> float:
        """Sequences of a step that decodes, on average."""
        return self.totals.decoded / max(1, self.totals.decode_steps)

    @property
    def backlog_grows(self) -> bool:
        """Whether more requests are inside towards the end of the arrivals than half way through, beyond chance: they
        come faster than they are answered."""
        first, last = self.arrival_s[0], self.arrival_s[-1]
        moments = first + (last - first) * np.linspace(0, 1, 201)
        half, end = self._inside(moments[80:120]), self._inside(moments[160:])
        return bool(end > 1.4 * half + 3 * half**0.5)

    def _inside(self, moments: Floats) -> float:
        """Requests in the deployment, on average over these moments."""
        came = np.searchsorted(self.arrival_s, moments, side="right")
        went = np.searchsorted(np.sort(self.last_token_s), moments, side="right")
        return float((came - went).mean())

    def within(self, ttft_s: float | None, tpot_s: float | None) -> NDArray[np.bool_]:
        """Which requests met the targets; None is no target."""
        good = np.ones(len(self.arrival_s), dtype=bool)
        if ttft_s is not None:
            good &= self.ttft_s <= ttft_s
        if tpot_s is not None:
            good &= ~(self.tpot_s > tpot_s)
        return good

    def goodput(self, ttft_s: float | None, tpot_s: float | None) -> float:
        """Requests per second that met the targets (arXiv 2401.09670, section 2)."""
        return float(self.within(ttft_s, tpot_s).sum()) / self.seconds

    def at_percentile(self, percentile: float) -> tuple[float, float]:
        """TTFT and TPOT, each at its own percentile; no TPOT is zero."""
        known = self.tpot_s[self.output_tokens > 1]
        tpot = float(np.percentile(known, percentile)) if len(known) else 0.0
        return float(np.percentile(self.ttft_s, percentile)), tpot

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Of TTFT, TPOT and latency: mean, p50, p90, p99 in seconds."""
        columns = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "latency_s": self.latency_s}
        return {name: _summary(values) for name, values in columns.items()}


def _summary(values: Floats) -> dict[str, float]:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return {"mean": 0.0, **{f"p{p}": 0.0 for p in PERCENTILES}}
    return {"mean": float(known.mean())} | {f"p{p}": float(np.percentile(known, p)) for p in PERCENTILES}
