"""What traffic makes of the cost of a step: requests go through replicas that batch continuously, event by event."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import numpy as np

from triaxial import BadInput
from triaxial.plan.serving.simulation.clock import Clock, CostOfStep
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.replica import Replica
from triaxial.plan.serving.simulation.served import Life, Served, Step
from triaxial.plan.serving.traffic import Traffic


def simulate(
    traffic: Traffic,
    cost: CostOfStep | Clock,
    limits: Limits,
    *,
    replicas: int = 1,
    trace: list[Step] | None = None,
) -> Served:
    """Serve all requests of `traffic`.

    A request goes to the replica with the fewest tokens outstanding, of equals to each in turn, as
    `triaxial.serve.replicas` does.

    Args:
        cost: of a step of one replica; a `Clock` where several simulations share it.
        trace: where to note every step of every replica.

    Raises:
        BadInput: a request that no replica can hold.
    """
    _check_fits(traffic, limits)
    clock = cost if isinstance(cost, Clock) else Clock(cost)
    columns = (traffic.arrival_s.tolist(), traffic.input_tokens.tolist(), traffic.output_tokens.tolist())
    lives = [Life(*request) for request in zip(*columns)]
    house = _House([Replica(clock, limits, lives, trace) for _ in range(replicas)])
    most = traffic.concurrency or len(lives)
    inside, coming = 0, 0
    while inside or coming < len(lives):
        arrival = lives[coming].arrival if coming < len(lives) and inside < most else math.inf
        if arrival <= house.next_event:
            house.arrive(coming, arrival)
            inside, coming = inside + 1, coming + 1
            continue
        now, answered = house.advance(arrival, alone=traffic.concurrency is None)
        inside -= len(answered)
        if traffic.concurrency:  # who is answered asks again
            for life in lives[coming : coming + most - inside]:
                life.arrival = max(life.arrival, now)
    return _served(lives, house.replicas, clock.cost.request_s)


def replay(traffic: Traffic, cost: CostOfStep, limits: Limits) -> Served:
    """Serve requests that were recorded, on one replica, to hold against what was recorded of them."""
    return simulate(traffic, cost, limits)


class _House:
    """All replicas, and which of them has the next event."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self._events: list[tuple[float, int]] = []  # a heap; entries that a replica has moved away from are void
        self._turn = 0

    @property
    def next_event(self) -> float:
        while self._events and self.replicas[self._events[0][1]].next_event != self._events[0][0]:
            heapq.heappop(self._events)
        return self._events[0][0] if self._events else math.inf

    def arrive(self, request: int, now: float) -> None:
        chosen = self._idlest(now)
        replica = self.replicas[chosen]
        before = replica.next_event
        replica.arrive(request)
        if replica.next_event != before:
            heapq.heappush(self._events, (replica.next_event, chosen))

    def _idlest(self, now: float) -> int:
        if len(self.replicas) == 1:
            return 0
        outstanding = [replica.outstanding(now) for replica in self.replicas]
        least = min(outstanding)
        idlest = [index for index, tokens in enumerate(outstanding) if tokens == least]
        self._turn += 1
        return idlest[self._turn % len(idlest)]

    def advance(self, arrival: float, alone: bool) -> tuple[float, list[int]]:
        """
        Args:
            arrival: when the next request will come.
            alone: what one replica answers brings nothing to another.

        Returns: the time of the next event, and the requests that it answers.
        """
        now, chosen = self.next_event, self._events[0][1]
        heapq.heappop(self._events)
        replica = self.replicas[chosen]
        answered = replica.advance(arrival if alone else min(arrival, self.next_event))
        if replica.next_event < math.inf:
            heapq.heappush(self._events, (replica.next_event, chosen))
        return now, answered


def _check_fits(traffic: Traffic, limits: Limits) -> None:
    largest = int((traffic.input_tokens + traffic.output_tokens).max())
    if largest > limits.kv_room:
        raise BadInput(
            f"a request of {largest} tokens needs more than the {limits.kv_room} that "
            "the KV cache of a replica holds: give it more GPUs, or shorter requests"
        )


def _served(lives: list[Life], replicas: Iterable[Replica], request_s: float) -> Served:
    return Served(
        arrival_s=np.array([life.arrival for life in lives]),
        begun_s=np.array([life.begun for life in lives]),
        first_token_s=np.array([life.first_token for life in lives]),
        last_token_s=np.array([life.last_token for life in lives]),
        input_tokens=np.array([life.prompt for life in lives]),
        output_tokens=np.array([life.output for life in lives]),
        replicas=tuple(replica.totals for replica in replicas),
        request_s=request_s,
    )
