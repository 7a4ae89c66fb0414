"""Why a layout wins: against the best of every other kind, by the resource that binds, up to where it stops winning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from triaxial import BadInput, NoAnswer
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout, parse_fields
from triaxial.plan.search.best import Space, search
from triaxial.plan.search.flips import Flip, flip_points
from triaxial.plan.search.turn import REACH
from triaxial.plan.search.what_if import Resource, has_network, scaled
from triaxial.plan.training.price import Estimate, estimate
from triaxial.plan.workload import Training

NEXT_BEST = "the next best mixture"
RUNNABLE = "the best that Triaxial itself can run, without cp and ep"
PART_WORDS = {
    "compute": "computation",
    "exposed_tp": "exposed tensor-parallel communication",
    "exposed_cp": "exposed context-parallel communication",
    "exposed_ep": "exposed expert-parallel communication",
    "exposed_pp": "exposed stage-to-stage transfers",
    "exposed_dp": "exposed data-parallel communication",
    "bubble": "the pipeline bubble",
    "optimizer": "the optimizer",
    "data": "reading data",
}


@dataclass(frozen=True)
class Rival:
    """The best layout of another kind, or why there is none."""

    kind: str
    estimate: Estimate | None
    reason: str = ""

    def sentence(self, winner: Estimate) -> str:
        if self.estimate is None:
            return f"{self.kind}: {self.reason}"
        ratio = self.estimate.step_time_s / winner.step_time_s - 1
        return f"{self.kind}, {self.estimate.layout}, takes {ratio:+.1%}: {_difference(winner, self.estimate)}"


@dataclass(frozen=True)
class Why:
    """The reasons of a plan, in words and in figures."""

    sentences: tuple[str, ...]
    rivals: tuple[Rival, ...]
    sensitivity: dict[str, float]
    """Per resource: % of step time that 1 % more of it saves."""
    flips: tuple[Flip, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sentences": list(self.sentences),
            "rivals": {r.kind: r.estimate.to_dict() if r.estimate else r.reason for r in self.rivals},
            "sensitivity": self.sensitivity,
            "flip_points": [vars(flip) for flip in self.flips],
        }


def explain(model: ModelSpec, cluster: Cluster, training: Training, winner: Estimate, space: Space, flips: bool) -> Why:
    """Say why `winner` wins.

    Args:
        space: what it was chosen from.
        flips: also look for flip points (some tens of searches).
    """
    rivals = _rivals(model, cluster, training, winner, space)
    sensitivity = resource_sensitivity(model, cluster, training, winner)
    found = tuple(flip_points(model, cluster, training, winner.layout)) if flips else ()
    sentences = [
        _winner_sentence(winner),
        _binding_sentence(sensitivity, winner, cluster),
        *(rival.sentence(winner) for rival in rivals),
        *(flip.sentence() for flip in found if flip.at is not None),
    ]
    steady = [flip.direction for flip in found if flip.at is None]
    if steady:
        sentences.append(f"The mixture stays with up to {2**REACH}x {', '.join(steady)}.")
    return Why(tuple(sentences), rivals, sensitivity, found)


def resource_sensitivity(model: ModelSpec, cluster: Cluster, training: Training, winner: Estimate) -> dict[str, float]:
    """By how many % a step gets shorter when a resource grows by 1 %, for the winner's own layout."""
    more = 1.01
    result = {}
    for resource in get_args(Resource):
        if resource == "memory" or (resource == "network" and not has_network(cluster)):
            continue
        faster = estimate(model, scaled(cluster, resource, more), training, winner.layout)
        result[resource] = 100 * (winner.step_time_s - faster.step_time_s) / winner.step_time_s
    return result


def why_not(text: str, winner: Estimate, model: ModelSpec, cluster: Cluster, training: Training) -> str:
    """Why a layout is not the answer: it is not legal, does not fit, or is slower by so much, and where.

    Args:
        text: `tp=16`, or more of a layout. What is not named is as in the winner where that divides the GPUs; dp
            takes what is left.

    Raises:
        BadInput: no such field, or no such value.
    """
    given = parse_fields(text)
    try:
        layout = _completed(given, winner.layout, cluster)
        rival = estimate(model, cluster, training, layout)
    except BadInput as error:
        return f"Not {text}: {error}"
    if not rival.fits:
        largest = max((part for part in rival.memory_gib if part != "peak"), key=rival.memory_gib.__getitem__)
        return (
            f"Not {layout}: it needs {rival.memory_gib['peak']:.1f} GiB of {cluster.device.memory_bytes / 2**30:.0f}, "
            f"most of them {largest} ({rival.memory_gib[largest]:.1f} GiB)"
        )
    ratio = rival.step_time_s / winner.step_time_s - 1
    return f"Not {layout}: it takes {ratio:+.1%}: {_difference(winner, rival)}"


def _completed(given: dict[str, Any], winner: Layout, cluster: Cluster) -> Layout:
    merged = vars(winner) | {"cut": ()} | given
    for axis in ("cp", "pp", "tp"):
        if axis not in given and cluster.num_gpus % (_model_ranks(merged) * given.get("dp", 1)):
            merged[axis] = 1
    if merged["pp"] != winner.pp:  # the winner's virtual stages suit its pipeline
        merged |= {"vpp": 1, "schedule": "1f1b"} | given
    return Layout(**{**merged, "dp": max(1, cluster.num_gpus // _model_ranks(merged)), **given})


def _model_ranks(sizes: dict[str, Any]) -> int:
    """Ranks that one copy of the model takes."""
    return int(sizes["tp"] * sizes["pp"] * sizes["cp"])


def _rivals(
    model: ModelSpec, cluster: Cluster, training: Training, winner: Estimate, space: Space
) -> tuple[Rival, ...]:
    every, layout, gpus = space.families, winner.layout, cluster.num_gpus
    winners = (every.tp == layout.tp) & (every.pp == layout.pp) & (every.cp == layout.cp) & (every.ep == layout.ep)
    kinds = {
        "pure tensor parallelism": every.tp == gpus,
        "pure pipeline parallelism": every.pp == gpus,
        "pure data parallelism": every.dp == gpus,
        NEXT_BEST: ~winners,
    }
    if layout.cp > 1 or layout.ep > 1:
        kinds[RUNNABLE] = (every.cp == 1) & (every.ep == 1)
    return tuple(
        _rival(kind, model, cluster, training, space.where(rows))
        for kind, rows in kinds.items()
        if gpus > 1 and (kind in (NEXT_BEST, RUNNABLE) or not (winners & rows).any())
    )


def _rival(kind: str, model: ModelSpec, cluster: Cluster, training: Training, among: Space) -> Rival:
    if len(among.families) == 0:
        return Rival(kind, None, f"{model.name} cannot be cut {cluster.num_gpus} ways with this batch")
    try:
        return Rival(kind, search(model, cluster, training, top=1, space=among).best[0])
    except NoAnswer as error:
        return Rival(kind, None, str(error))


def _winner_sentence(winner: Estimate) -> str:
    shares = sorted(winner.time_s.items(), key=lambda item: -item[1])
    named = [f"{seconds / winner.step_time_s:.0%} {PART_WORDS[part]}" for part, seconds in shares if seconds > 0]
    return f"{winner.layout} takes {winner.step_time_s:.3f} s a step: {', '.join(named[:4])}."


def _binding_sentence(sensitivity: dict[str, float], winner: Estimate, cluster: Cluster) -> str:
    binding = max(sensitivity, key=sensitivity.__getitem__)
    held = winner.memory_gib["peak"] / (cluster.device.memory_bytes / 2**30)
    return (
        f"What binds is {binding}: 1 % more of it saves {sensitivity[binding]:.2f} % of the step; "
        f"{held:.0%} of the memory is in use."
    )


def _difference(winner: Estimate, rival: Estimate) -> str:
    """The parts in which two layouts differ most, as the rival's gain or loss."""
    parts = {part: rival.time_s[part] - winner.time_s[part] for part in winner.time_s}
    largest = sorted(parts, key=lambda part: -abs(parts[part]))[:3]
    named = [f"{parts[part]:+.3f} s {PART_WORDS[part]}" for part in largest if abs(parts[part]) > 0.0005]
    return ", ".join(named) or "no part differs by a millisecond"
