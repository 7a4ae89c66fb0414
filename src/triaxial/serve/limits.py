"""How much the server takes on, and the door that keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from triaxial.serve.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Each is answered with a 4xx when it is passed."""

    max_queue: int = 512
    """Sequences that wait for a place in a batch."""
    max_concurrent: int = 1024
    """Requests being answered at the same time."""
    max_body_bytes: int = 8 << 20
    timeout_s: float = 600.0
    """For the whole answer to a request."""


class Door:
    """Counts what is inside. `places` is how many sequences all replicas together decode at the same time."""

    def __init__(self, limits: Limits, places: int) -> None:
        self.requests = 0
        self._sequences, self._limits = 0, limits
        self._most_sequences = places + limits.max_queue

    def require_room(self, sequences: int) -> None:
        """Refuse a request for so many sequences before any work is put into it.

        Raises:
            ApiError: the house is full, or the request is larger than it.
        """
        most = self._most_sequences
        if sequences > most:
            raise ApiError(400, f"{sequences} sequences in one request, and {most} is the most: split it")
        if self._sequences + sequences > most:
            raise ApiError(429, f"the queue is full ({self._limits.max_queue} sequences wait): try again later")
        if self.requests >= self._limits.max_concurrent:
            raise ApiError(429, f"{self._limits.max_concurrent} requests are being answered: try again later")

    @contextmanager
    def enter(self, sequences: int) -> Iterator[None]:
        """Take in a request for so many sequences for as long as it is answered.

        Raises:
            ApiError: there is no room for it.
        """
        self.require_room(sequences)
        self.requests += 1
        self._sequences += sequences
        try:
            yield
        finally:
            self.requests -= 1
            self._sequences -= sequences
