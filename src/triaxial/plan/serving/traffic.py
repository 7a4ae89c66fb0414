"""Traffic: the requests that arrive at a deployment, each with its time and its lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from triaxial import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_TOKENS = 10_000_000  # of one prompt or answer: anything beyond is a slip of the keyboard


@dataclass(frozen=True)
class Traffic:
    """Requests in the order of their arrival, as columns of equal length."""

    arrival_s: Floats
    """Seconds since the first could have come; zero throughout: all at once."""
    input_tokens: Ints
    output_tokens: Ints
    concurrency: int | None = None
    """A closed loop: no more than so many are in the deployment at once, and the next comes when one is answered."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float | None:
        """Requests per second; None where they do not come by themselves."""
        last = float(self.arrival_s[-1])
        return len(self) / last if last > 0 else None

    def at_rate(self, rate: float) -> Traffic:
        """The same requests, closer together or further apart, so that `rate` come in a second."""
        now = self.rate
        if now is None:
            raise BadInput("requests that all come at once have no rate: give arrival times or leave --rate out")
        return replace(self, arrival_s=self.arrival_s * (now / rate))

    def at_least(self, count: int) -> Traffic:
        """As many requests or more: they come again, in the same order and with the same gaps."""
        if len(self) >= count:
            return self
        gaps = np.diff(self.arrival_s, prepend=0.0)
        return replace(
            self,
            arrival_s=np.cumsum(np.resize(gaps, count)),
            input_tokens=np.resize(self.input_tokens, count),
            output_tokens=np.resize(self.output_tokens, count),
        )

    def first(self, count: int) -> Traffic:
        return replace(
            self,
            arrival_s=self.arrival_s[:count],
            input_tokens=self.input_tokens[:count],
            output_tokens=self.output_tokens[:count],
        )


class Lengths(Protocol):
    """How long prompts or answers are."""

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        """[count], each at least 1"""

    @property
    def mean(self) -> float: ...


@dataclass(frozen=True)
class Fixed:
    tokens: int

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        return np.full(count, self.tokens, dtype=np.int64)

    @property
    def mean(self) -> float:
        return float(self.tokens)


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithms are normal: what people write and what models answer are about that."""

    mean: float
    sigma: float
    """Standard deviation of the natural logarithm."""

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        of_median = np.log(self.mean) - self.sigma**2 / 2  # so that the mean is the one given
        drawn = np.rint(random.lognormal(of_median, self.sigma, count))
        return np.clip(drawn, 1, MAX_TOKENS).astype(np.int64)


def parse_lengths(option: str, text: str) -> Fixed | LogNormal:
    """Read `1024`, or `lognormal:MEAN:SIGMA` such as `lognormal:1024:0.5`.

    Args:
        option: what is being read, for the error.

    Raises:
        BadInput: neither of the two forms, or a size out of range.
    """
    kind, _, rest = text.strip().partition(":")
    try:
        if kind == "lognormal":
            mean, sigma = (float(part) for part in rest.split(":"))
            found: Fixed | LogNormal = LogNormal(mean, sigma)
            good = 1 <= mean <= MAX_TOKENS and 0 <= sigma <= 5
        else:
            found = Fixed(int(text))
            good = 1 <= found.tokens <= MAX_TOKENS
    except ValueError:
        good = False
    if not good:
        raise BadInput(
            f"--{option} {text!r} is no length: give tokens such as 1024, or lognormal:MEAN:SIGMA such as "
            f"lognormal:1024:0.5 (mean of 1 to {MAX_TOKENS}, sigma of 0 to 5)"
        )
    return found


def poisson(inputs: Ints, outputs: Ints, rate: float, seed: int = 0) -> Traffic:
    """Requests that come independently of each other, `rate` per second on average.

    The gaps are those of one random sequence scaled by the rate: a higher rate gives the same requests, only closer.
    """
    gaps = np.random.default_rng([seed, 1]).exponential(1.0, len(inputs))
    return Traffic(np.cumsum(gaps) / rate, inputs, outputs)


def at_once(inputs: Ints, outputs: Ints) -> Traffic:
    """All requests are there from the beginning: the load that benchmarks call maximal."""
    return Traffic(np.zeros(len(inputs)), inputs, outputs)


def closed_loop(inputs: Ints, outputs: Ints, concurrency: int) -> Traffic:
    """So many clients, each of which asks again as soon as it is answered."""
    return replace(at_once(inputs, outputs), concurrency=concurrency)


def draw_lengths(inputs: Lengths, outputs: Lengths, count: int, seed: int = 0) -> tuple[Ints, Ints]:
    """Lengths of `count` requests; more requests begin with the same ones."""
    return (
        inputs.draw(count, np.random.default_rng([seed, 2])),
        outputs.draw(count, np.random.default_rng([seed, 3])),
    )
