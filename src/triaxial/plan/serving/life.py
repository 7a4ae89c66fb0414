"""What a simulation keeps: the life of each request, the sums over a replica's steps, and if asked for every step."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
