"""The best deployments for some traffic: screened in closed form, then simulated.

A deployment is replicas of tp x pp GPUs with a limit of sequences and of tokens in a step. Left out before anything is
simulated are those that cannot hold the longest request, and those that miss a target even for a request that has a
replica to itself: traffic makes no latency shorter. For the rest the steady state (`steady.py`) chooses the limits and
the order; those that it puts near the best are simulated, and the simulation decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.search.what_if import with_gpus
from triaxial.plan.serving.demand import Demand, Objective
from triaxial.plan.serving.engine import VLLM, Engine
from triaxial.plan.serving.search.candidates import CHUNK_TOKENS, Candidate, Screened, candidates, screen, screen_at
from triaxial.plan.serving.search.closed_form import alone
from triaxial.plan.serving.search.option import Option, operate
from triaxial.plan.serving.workload import Serving

Progress = Callable[[int, int], None]
"""Called with the candidates simulated, and those to simulate in all."""

NEAR = 1.5
"""Candidates that the closed form puts so many times behind the best are not simulated, unless too few are left."""
MOST_SIMULATED = 12


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: tuple[Option, ...]
    """Best first; one for each tp x pp that was simulated and does."""
    screened: tuple[Screened, ...]
    """All that could do, in the order of their closed form."""
    considered: tuple[Candidate, ...]
    """All ways to cut the model."""


def search(
    model: ModelSpec,
    cluster: Cluster,
    work: Serving,
    demand: Demand,
    objective: Objective,
    *,
    engine: Engine = VLLM,
    top: int = 5,
    progress: Progress | None = None,
) -> Found:
    """Find the best deployments.

    Raises:
        NoAnswer: nothing fits, or nothing meets the demand; the sentence says what comes nearest.
    """
    every = list(candidates(model, cluster, work, engine))
    able = [candidate for candidate in every if candidate.holds(demand.longest)]
    if not able:
        raise NoAnswer(_does_not_fit(every, demand))
    quick = [candidate for candidate in able if demand.met(*alone_in(candidate, demand))]
    if not quick:
        raise NoAnswer(_too_slow(able, demand))
    screened = sorted((screen(candidate, demand, objective) for candidate in quick), key=lambda s: s.score)
    chosen = _promising(screened, top)
    best: list[Option] = []
    for done, one in enumerate(chosen):
        if progress:
            progress(done, len(chosen))
        to_beat = best[top - 1].score(objective)[0] if len(best) >= top else math.inf
        option = operate(one, demand, objective, to_beat)
        best = sorted([*best, *([option] if option else [])], key=lambda option: option.score(objective))
    if not best:
        raise NoAnswer(_too_much(quick, demand, objective))
    best[0] = _tuned(best[0], demand, objective)
    return Found(tuple(best), tuple(screened), tuple(every))


def _promising(screened: Sequence[Screened], top: int) -> list[Screened]:
    near = [one for one in screened if one.score <= NEAR * screened[0].score]
    return near[:MOST_SIMULATED] if len(near) >= top else list(screened[:top])


def _tuned(option: Option, demand: Demand, objective: Objective) -> Option:
    """The option with half or twice the tokens in a step, if that is simulated to be better."""
    candidate, chunk = option.candidate, option.limits.chunk_tokens
    for near in sorted({chunk // 2, 2 * chunk} & set(CHUNK_TOKENS)):
        if candidate.largest_batch(near, demand.longest) is None:
            continue
        other = operate(screen_at(candidate, demand, objective, near), demand, objective, option.score(objective)[0])
        if other and other.score(objective) < option.score(objective):
            option = other
    return option


def alone_in(candidate: Candidate, demand: Demand) -> tuple[float, float]:
    """TTFT and TPOT of a long request that has a replica to itself."""
    return alone(candidate.cost, CHUNK_TOKENS, demand.long_input, demand.mean_output)


# Why nothing does


def _does_not_fit(every: Sequence[Candidate], demand: Demand) -> str:
    larger = _larger(every[0], lambda able: any(one.holds(demand.longest) for one in able))
    needs = f"the smallest cluster that would do is {larger.name}" if larger else "no cluster of such GPUs does"
    model, cluster = every[0].model, every[0].cluster
    return f"{model.name} with one request of {demand.longest} tokens does not fit on {cluster.name}; {needs}"


def _too_slow(able: Sequence[Candidate], demand: Demand) -> str:
    figures = [(*alone_in(candidate, demand), candidate.layout) for candidate in able]
    first = min(figures, key=lambda figure: figure[0])
    each = min(figures, key=lambda figure: figure[1])
    wanted = [f"TTFT {demand.ttft_s:g} s"] if demand.ttft_s else []
    wanted += [f"TPOT {demand.tpot_s:g} s"] if demand.tpot_s else []
    return (
        f"no layout reaches {' and '.join(wanted)} even for a request alone: the best TTFT is {first[0]:.3g} s "
        f"(tp={first[2].tp},pp={first[2].pp}, then TPOT {first[1]:.3g} s), the best TPOT {each[1]:.3g} s "
        f"(tp={each[2].tp},pp={each[2].pp}, then TTFT {each[0]:.3g} s)"
    )


def _too_much(quick: Sequence[Candidate], demand: Demand, objective: Objective) -> str:
    def do(able: Sequence[Candidate]) -> bool:
        able = [one for one in able if one.holds(demand.longest) and demand.met(*alone_in(one, demand))]
        screened = sorted((screen(one, demand, objective) for one in able), key=lambda s: s.score)
        return any(operate(one, demand, objective) for one in screened[:2])

    larger = _larger(quick[0], do)
    asked = f"{demand.rate:g} requests per second within the targets" if demand.rate else "within the targets"
    nearest = f"the fewest GPUs that would do are about {larger.num_gpus}" if larger else "no cluster of such GPUs does"
    return f"{quick[0].cluster.name} does not serve {asked}; {nearest}"


def _larger(one: Candidate, do: Callable[[Sequence[Candidate]], bool]) -> Cluster | None:
    """The cluster doubled until its candidates do."""
    gpus = one.cluster.num_gpus
    for _ in range(6):
        gpus *= 2
        try:
            larger = with_gpus(one.cluster, gpus)
        except BadInput:
            return None
        if do(list(candidates(one.model, larger, one.work, one.cost.engine))):
            return larger
    return None
