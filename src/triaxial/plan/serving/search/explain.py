"""Why a deployment wins: where its requests' time goes, who loses by how much, and what would change the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from triaxial.plan.serving.demand import Demand, Objective
from triaxial.plan.serving.search.candidates import Candidate
from triaxial.plan.serving.search.flips import Flip, flip_points
from triaxial.plan.serving.search.option import Option, carried_rate
from triaxial.plan.serving.search.search import Found, alone_in
from triaxial.plan.serving.simulation.served import Served

TERM_WORDS = {
    "weights": "reading weights",
    "compute": "arithmetic",
    "kv": "reading keys and values",
    "passes": "norms and element-wise passes",
    "launches": "starting kernels",
    "all_reduce": "tensor-parallel all-reduces",
    "hops": "hops between pipeline stages",
    "sampling": "logits and sampling",
    "host": "the host between steps",
    "queueing": "queueing",
    "prompt": "its prompt",
    "others": "others' prompts in the same steps",
}
_MEASURES = {
    "latency": "latency",
    "throughput": "GPU time for each request",
    "gpus": "GPUs",
    "cost": "money",
}
OBJECTIVE_WORDS = {
    "latency": "shortest latency",
    "throughput": "most tokens/s per GPU",
    "gpus": "fewest GPUs",
    "cost": "least money per token",
}


@dataclass(frozen=True)
class Why:
    """The reasons of a plan, in words and in figures."""

    sentences: tuple[str, ...]
    time_s: dict[str, float]
    """Seconds of a mean request by what takes them, adding up to its latency."""
    binds: str
    """The largest of them, queueing left out where all requests came at once."""
    flips: tuple[Flip, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sentences": list(self.sentences),
            "binds": self.binds,
            "time_s": self.time_s,
            "flip_points": [vars(flip) for flip in self.flips],
        }


def explain(found: Found, objective: Objective, flips: bool) -> Why:
    """Say why the first of `found` wins.

    Args:
        flips: also look for flip points.
    """
    winner = found.best[0]
    parts = request_seconds(winner.candidate, winner.served)
    binds = _binding(parts, winner)
    points = tuple(flip_points(found, objective)) if flips else ()
    sentences = [
        _winner_sentence(winner, objective),
        _time_sentence(winner, parts, binds),
        *_money_sentences(winner),
        *_growth_sentences(winner, objective),
        *(_rival_sentence(winner, rival, objective) for rival in found.best[1:4]),
        *_neighbour_sentences(found, objective),
        *(flip.sentence() for flip in points if flip.at is not None),
    ]
    steady = [flip.direction for flip in points if flip.at is None]
    if steady:
        sentences.append(f"The split stays with up to 8x {', '.join(steady)}.")
    return Why(tuple(sentences), parts, binds, points)


def request_seconds(candidate: Candidate, served: Served) -> dict[str, float]:
    """Seconds of a mean request by what takes them: waiting, its prompt, and for every further token the terms of a mean
    decode step, then what others' prompts add to that by making steps longer, in a pipeline those ahead too."""
    queueing = float((served.begun_s - served.arrival_s).mean())
    prompt = float(served.ttft_s.mean()) - queueing
    decoding = float((served.last_token_s - served.first_token_s).mean())
    steps = float((served.output_tokens - 1).mean())
    totals = served.totals
    terms: dict[str, float] = {}
    if totals.decode_steps:
        mean_step = (0.0, 0.0, totals.decoded / totals.decode_steps, totals.decode_context / totals.decode_steps)
        terms = {term: steps * float(seconds) for term, seconds in candidate.cost.parts(*mean_step).items()}
    return {"queueing": queueing, "prompt": prompt, **terms, "others": max(0.0, decoding - sum(terms.values()))}


def _winner_sentence(winner: Option, objective: Objective) -> str:
    ttft, tpot = winner.served.at_percentile(90)
    return (
        f"{name(winner)} gives the {OBJECTIVE_WORDS[objective]}: {gpus(winner)}, "
        f"{winner.output_tokens_per_s:,.0f} tokens/s ({winner.tokens_per_s_per_gpu:,.0f} per GPU) at "
        f"{winner.requests_per_s:.3g} requests/s; nine in ten requests see TTFT {ttft:.3g} s and TPOT {tpot:.3g} s"
        f"{_targets(winner.demand)}."
    )


def name(option: Option) -> str:
    """`2 replicas of tp=4, pp=1`."""
    one = f"tp={option.layout.tp}, pp={option.layout.pp}"
    return f"{option.replicas} replicas of {one}" if option.replicas > 1 else f"one replica of {one}"


def gpus(option: Option) -> str:
    return "1 GPU" if option.gpus == 1 else f"{option.gpus} GPUs"


def _targets(demand: Demand) -> str:
    wanted = [f"TTFT {demand.ttft_s:g} s"] if demand.ttft_s else []
    wanted += [f"TPOT {demand.tpot_s:g} s"] if demand.tpot_s else []
    return f" (targets: {', '.join(wanted)})" if wanted else ""


def _binding(parts: dict[str, float], winner: Option) -> str:
    """What takes most of a request's time; waiting says nothing where all requests came at once."""
    at_once = winner.rate is None
    return max((part for part in parts if not (at_once and part == "queueing")), key=parts.__getitem__)


def _time_sentence(winner: Option, parts: dict[str, float], binds: str) -> str:
    total = sum(parts.values())
    shares = sorted(parts.items(), key=lambda item: -item[1])
    named = [f"{seconds / total:.0%} {TERM_WORDS[part]}" for part, seconds in shares if seconds > 0.005 * total]
    bubble = f" Stages idle {1 - winner.served.utilisation:.0%} of the time (bubble)." if winner.layout.pp > 1 else ""
    return (
        f"A request takes {total:.3g} s on average: {', '.join(named[:6])}. "
        f"What binds is {TERM_WORDS[binds]}; {winner.served.decode_batch:.1f} sequences decode in a step.{bubble}"
    )


def _money_sentences(winner: Option) -> list[str]:
    hours = winner.gpus / (winner.output_tokens_per_s * 3600 / 1e6)
    price = winner.candidate.cluster.gpu_price_per_hour
    money = f", {winner.cost_per_million_tokens(price):.3g} in money" if price else ""
    return [f"A million output tokens take {hours:.3g} GPU-hours{money}."]


def _neighbour_sentences(found: Found, objective: Objective) -> list[str]:
    """Of the splits with twice or half the winner's tp or pp, those that no rival's sentence names: why not they."""
    winner, named = found.best[0], {_split(option.candidate) for option in found.best[:4]}
    tp, pp = _split(winner.candidate)
    near = {(2 * tp, pp), (tp // 2, pp), (tp, 2 * pp), (tp, pp // 2)} - named
    return [_why_not(one, found, objective) for one in found.considered if _split(one) in near]


def _split(candidate: Candidate) -> tuple[int, int]:
    return candidate.layout.tp, candidate.layout.pp


def _why_not(candidate: Candidate, found: Found, objective: Objective) -> str:
    demand, split = found.best[0].demand, f"tp={candidate.layout.tp}, pp={candidate.layout.pp}"
    if not candidate.holds(demand.longest):
        return f"{split}: a replica's memory does not hold the weights and one request of {demand.longest} tokens."
    ttft, tpot = alone_in(candidate, demand)
    if not demand.met(ttft, tpot):
        return f"{split}: even a request alone takes TTFT {ttft:.3g} s and TPOT {tpot:.3g} s."
    simulated = next((option for option in found.best if option.candidate is candidate), None)
    if simulated:
        return _rival_sentence(found.best[0], simulated, objective)
    score = {id(one.candidate): one.score for one in found.screened}
    behind = score[id(candidate)] / score[id(found.best[0].candidate)] - 1
    if behind == math.inf:
        return f"{split}: no load or number of replicas meets the targets."
    return f"{split}: {behind:+.0%} {_MEASURES[objective]} in closed form."


def _growth_sentences(winner: Option, objective: Objective) -> list[str]:
    """How far a load that was given may grow."""
    if winner.demand.rate is None or objective == "latency":
        return []
    return [f"These GPUs carry up to {carried_rate(winner):.3g} requests/s; more need more replicas."]


def _rival_sentence(winner: Option, rival: Option, objective: Objective) -> str:
    ours, theirs = (request_seconds(option.candidate, option.served) for option in (winner, rival))
    change = {part: theirs.get(part, 0.0) - seconds for part, seconds in ours.items()}
    largest = sorted(change, key=lambda part: -abs(change[part]))[:2]
    why = ", ".join(f"{change[part]:+.2g} s {TERM_WORDS[part]}" for part in largest)
    return f"{name(rival)}: {_loss(winner, rival, objective)}; of a request's time {why}."


def _loss(winner: Option, rival: Option, objective: Objective) -> str:
    if objective == "latency":
        return f"a request takes {rival.latency_s / winner.latency_s - 1:+.1%}"
    if objective == "gpus" or winner.demand.rate is not None:
        more = gpus(rival) if rival.gpus != winner.gpus else f"as many GPUs ({rival.gpus})"
        return f"{more}, and a request takes {rival.latency_s / winner.latency_s - 1:+.1%}"
    return f"{rival.tokens_per_s_per_gpu / winner.tokens_per_s_per_gpu - 1:+.1%} tokens/s per GPU"
