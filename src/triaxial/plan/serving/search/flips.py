"""Flip points: how far a circumstance must move until another split of the GPUs wins.

The simulated best and the candidates nearest to it are priced again in closed form, each corrected by what its simulation
said of its closed form; a flip is found by doubling and then bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from triaxial.cluster.hardware import NETWORK_LINKS
from triaxial.cluster.spec import Cluster
from triaxial.plan.search.turn import REACH, turning_point
from triaxial.plan.search.what_if import Resource, has_network, scaled
from triaxial.plan.serving.cost.step import step_cost
from triaxial.plan.serving.demand import Demand, Objective
from triaxial.plan.serving.search.candidates import Candidate, screen
from triaxial.plan.serving.search.option import OF_CLOSED_FORM, Option
from triaxial.plan.serving.search.search import Found

PRECISION = 1.05
"""Bisection stops when the flip is known to within this factor."""
CONTENDERS = 8

Change = Callable[[Candidate, Demand, float], tuple[Candidate, Demand]]


@dataclass(frozen=True)
class Flip:
    """The nearest value of one circumstance, in one direction, at which another split wins."""

    what: str
    now: float
    at: float | None
    """None: the winner keeps winning within the reach of the search."""
    layout: str
    """Who wins there; empty if none does what is asked, or none changes."""
    unit: str
    upward: bool

    @property
    def direction(self) -> str:
        return f"{'more' if self.upward else 'less'} {self.what}"

    def sentence(self) -> str:
        if self.at is None:
            return f"With up to {2**REACH}x {self.direction} no other split wins"
        winner = f"{self.layout} wins" if self.layout else "no split does what is asked"
        side = "above" if self.upward else "below"
        return f"{self.what} {side} {self.at:.3g} {self.unit} (now {self.now:.4g}): {winner}."


@dataclass(frozen=True)
class _Contender:
    candidate: Candidate
    holds: float
    """What simulation holds of the closed form's promise: a share of its rate, or of the inverse of its latency."""

    def score(self, demand: Demand, objective: Objective) -> float:
        """Less is better; whole GPUs where a rate must be served."""
        closed = screen(self.candidate, demand, objective).score / self.holds
        if demand.rate is None or objective == "latency" or closed == math.inf:
            return closed
        replicas = math.ceil(closed / self.candidate.replica_gpus - 1e-9)
        return float(replicas * self.candidate.replica_gpus) if replicas <= self.candidate.most_replicas else math.inf


def flip_points(found: Found, objective: Objective) -> Iterator[Flip]:
    """Look for the flips of every circumstance in both directions."""
    contenders = _contenders(found, objective)
    winner, demand = found.best[0].candidate, found.best[0].demand

    def best(change: Change, factor: float) -> Candidate | None:
        scores = []
        for contender in contenders:
            candidate, there = change(contender.candidate, demand, factor)
            scores.append(replace(contender, candidate=candidate).score(there, objective))
        first = min(range(len(scores)), key=scores.__getitem__)
        return contenders[first].candidate if scores[first] < math.inf else None

    for what, now, unit, change in _circumstances(winner.cluster, demand):
        for upward in (False, True):
            yield _find(lambda factor, change=change: best(change, factor), winner, what, now, unit, upward)  # type: ignore[misc]


def _contenders(found: Found, objective: Objective) -> list[_Contender]:
    """Those that were simulated, best first so that it wins ties, then the next in closed form."""
    closed = {id(one.candidate): one.score for one in found.screened}
    simulated = [
        _Contender(option.candidate, _holds(option, objective, closed[id(option.candidate)])) for option in found.best
    ]
    mean = sum(contender.holds for contender in simulated) / len(simulated)
    known = {id(contender.candidate) for contender in simulated}
    others = [_Contender(one.candidate, mean) for one in found.screened if id(one.candidate) not in known]
    return [*simulated, *others][:CONTENDERS]


def _holds(option: Option, objective: Objective, closed: float) -> float:
    """Where replicas are whole, any share from that at which one fewer would do to that at which these just do."""
    if option.demand.rate is None or objective == "latency":
        return closed / option.score(objective)[0]
    needed = closed / option.candidate.replica_gpus
    least = needed / option.replicas
    most = needed / (option.replicas - 1) if option.replicas > 1 else math.inf
    return min(max(OF_CLOSED_FORM, least), most * (1 - 1e-6))


def _circumstances(cluster: Cluster, demand: Demand) -> Iterator[tuple[str, float, str, Change]]:
    inside = [tier for tier in cluster.tiers if tier.link not in NETWORK_LINKS]
    if inside and cluster.gpus_per_node > 1:
        yield "link inside a node", inside[0].bandwidth_bytes_per_s / 1e9, "GB/s", _with_link("links inside a node")
    if has_network(cluster):
        rate = next(tier.bandwidth_bytes_per_s for tier in cluster.tiers if tier.link in NETWORK_LINKS)
        yield "network per NIC", rate * 8 / 1e9, "Gb/s", _with_link("network")
    if demand.rate is not None:
        yield "rate", demand.rate, "requests/s", lambda c, d, factor: (c, d.times(rate=factor))
    yield "output length", demand.mean_output, "tokens", lambda c, d, factor: (c, d.times(output=factor))
    yield "input length", demand.mean_input, "tokens", lambda c, d, factor: (c, d.times(input=factor))


def _with_link(resource: Resource) -> Change:
    def change(candidate: Candidate, demand: Demand, factor: float) -> tuple[Candidate, Demand]:
        cluster = scaled(candidate.cluster, resource, factor)
        cost = step_cost(candidate.model, cluster, candidate.layout, candidate.work, candidate.cost.engine)
        return replace(candidate, cluster=cluster, cost=cost), demand

    return change


def _find(
    best: Callable[[float], Candidate | None], winner: Candidate, what: str, now: float, unit: str, upward: bool
) -> Flip:
    turn = turning_point(best, lambda found: found is winner, upward=upward, precision=PRECISION)
    if turn is None:
        return Flip(what, now, None, "", unit, upward)
    factor, found = turn
    split = f"tp={found.layout.tp}, pp={found.layout.pp}" if found else ""
    return Flip(what, now, now * factor, split, unit, upward)
