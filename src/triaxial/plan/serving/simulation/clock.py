"""`Clock`: a `StepCost` as a simulation asks for it, with decode steps in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Number = float | NDArray[np.float64]


class CostOfStep(Protocol):
    """The part of `StepCost` that a simulation needs; arguments as there."""

    @property
    def pipeline_ranks(self) -> int: ...

    @property
    def request_s(self) -> float: ...

    @property
    def uneven(self) -> float: ...

    def seconds(
        self,
        prefill_tokens: float,
        prefill_context_pairs: float,
        decode_sequences: float,
        decode_context: float,
        prefill_sequences: float = ...,
        /,
    ) -> Number: ...

    def interval_seconds(
        self,
        prefill_tokens: float,
        prefill_context_pairs: float,
        decode_sequences: float,
        decode_context: float,
        prefill_sequences: float = ...,
        /,
    ) -> Number: ...


class Line(NamedTuple):
    """Seconds of a decode step over the tokens that its sequences hold: `fixed + slope * context`."""

    fixed: float
    slope: float
    up_to: float
    """Tokens beyond which another line holds."""

    def at(self, context: int) -> float:
        return self.fixed + self.slope * context

    def elapsed(self, steps: int, sequences: int, context: int) -> float:
        """Seconds of so many steps in a row, each of which adds a token to every sequence.

        Args:
            context: tokens that the sequences hold in the first step.
        """
        held = steps * context + sequences * (steps * (steps - 1) // 2)
        return steps * self.fixed + self.slope * held

    def steps_until(self, seconds: float, most: int, sequences: int, context: int) -> int:
        """The fewest of 1 to `most` steps in a row that take at least `seconds`: the root of the quadratic above."""
        square = self.slope * sequences / 2
        linear = self.at(context) - square
        if square > 0:
            root = (math.sqrt(linear * linear + 4 * square * max(seconds, 0.0)) - linear) / (2 * square)
        else:
            root = seconds / linear
        steps = min(most, max(1, math.ceil(root)))
        while steps > 1 and self.elapsed(steps - 1, sequences, context) >= seconds:  # rounding
            steps -= 1
        while steps < most and self.elapsed(steps, sequences, context) < seconds:
            steps += 1
        return steps


class Clock:
    """Seconds of steps, from their start to their tokens, and until the next step can follow into the pipeline."""

    def __init__(self, cost: CostOfStep) -> None:
        self.cost = cost
        self.stages = cost.pipeline_ranks
        self._lines: dict[tuple[int, int], tuple[Line, Line]] = {}

    def decode(self, sequences: int, context: int) -> tuple[Line, Line]:
        """Lines of `seconds` and `interval_seconds` around this context, exact where the cost is affine in it.

        The context's doublings share a line each: a sliding window bends the cost, and the slowest stage may change.
        """
        doubling = (context // sequences).bit_length()
        found = self._lines.get((sequences, doubling))
        if found is None:
            low, high = sequences << doubling >> 1, sequences << doubling
            found = self._lines[sequences, doubling] = (
                _line(self.cost.seconds, sequences, low, high),
                _line(self.cost.interval_seconds, sequences, low, high),
            )
        return found

    def mixed(self, tokens: int, pairs: int, sequences: int, context: int, ending: int) -> tuple[float, float]:
        """`seconds` and `interval_seconds` of a step with prompts in it."""
        seconds = float(self.cost.seconds(tokens, pairs, sequences, context, ending))
        if self.stages == 1:
            return seconds, seconds
        return seconds, float(self.cost.interval_seconds(tokens, pairs, sequences, context, ending))


class _Seconds(Protocol):
    def __call__(self, tokens: float, pairs: float, sequences: float, context: float, /) -> Number: ...


def _line(seconds: _Seconds, sequences: int, low: int, high: int) -> Line:
    at_low, at_high = float(seconds(0, 0, sequences, low)), float(seconds(0, 0, sequences, high))
    slope = (at_high - at_low) / (high - low)
    return Line(at_low - slope * low, slope, high)
