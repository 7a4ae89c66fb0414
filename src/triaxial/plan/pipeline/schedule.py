"""`build_schedule`: the table of a known schedule, by name."""

from __future__ import annotations

import math
from dataclasses import replace

from triaxial import BadInput
from triaxial.plan.layout import ScheduleKind
from triaxial.plan.pipeline import generators
from triaxial.plan.pipeline.action import Action, ActionKind
from triaxial.plan.pipeline.simulate import Durations, StageCosts, simulate
from triaxial.plan.pipeline.table import Schedule
from triaxial.plan.pipeline.weight_gradients import place_weight_gradients

__all__ = ["Action", "ActionKind", "Durations", "Schedule", "ScheduleKind", "build_schedule"]

EQUAL = Durations()


def build_schedule(
    kind: ScheduleKind,
    *,
    ranks: int,
    micro_batches: int,
    virtual_stages: int | None = None,
    durations: Durations = EQUAL,
    memory_limit: int | None = None,
) -> Schedule:
    """Write the table of a known schedule for any number of ranks and micro-batches.

    Args:
        kind: the schedule.
        ranks: pipeline ranks.
        micro_batches: micro-batches of one step.
        virtual_stages: stages on each rank; by default what the kind takes: 2 for interleaved and zb-v, else 1.
        durations: what the zero-bubble kinds place weight gradients by, where that beats the published order.
        memory_limit: activations (of one virtual stage and micro-batch) that a rank may hold. The zb-h kinds run ahead
            less far to keep it; the others are refused if they exceed it.

    Raises:
        BadInput: a number below 1, virtual stages that the kind does not have, or a memory limit that it exceeds.
    """
    for name, number in (("ranks", ranks), ("micro-batches", micro_batches), ("memory limit", memory_limit)):
        if number is not None and number < 1:
            raise BadInput(f"schedule: {name} must be at least 1, not {number}")
    stages_per_rank = _stages_per_rank(kind, ranks, virtual_stages)
    most = math.inf if memory_limit is None else memory_limit
    match kind:
        case "gpipe":
            table = generators.gpipe(ranks, micro_batches)
        case "1f1b":
            table = generators.one_forward_one_backward(ranks, micro_batches)
        case "interleaved":
            table = generators.interleaved(ranks, micro_batches, stages_per_rank)
        case "zb-v" if stages_per_rank == 2:
            table = generators.zero_bubble_v(ranks, micro_batches)
        case "zb-h1" | "zb-v":  # a V of one rank with one stage is ZB-H1 of one rank
            table = generators.zero_bubble_h(ranks, micro_batches, int(min(most, ranks)))
        case "zb-h2":
            table = generators.zero_bubble_h(ranks, micro_batches, int(min(most, 2 * ranks - 1)))
    schedule = Schedule(kind, micro_batches, generators.stage_placement(kind, ranks, stages_per_rank), table)
    if kind.startswith("zb"):
        schedule = _with_better_weight_gradients(schedule, durations)
    if (peak := max(schedule.peak_activations)) > most:
        raise BadInput(
            f"{kind} on {ranks} ranks with {micro_batches} micro-batches holds {peak} activations at once, more than the "
            f"memory limit of {memory_limit}: allow {peak}, or take zb-h1 or zb-h2, which keep any limit"
        )
    return schedule


def _stages_per_rank(kind: ScheduleKind, ranks: int, given: int | None) -> int:
    own = 2 if kind in ("interleaved", "zb-v") else 1
    if given is None or given == own or (ranks == 1 and given == 1):
        return given or own
    if kind == "interleaved" and given > 2:
        return given
    wanted = {"interleaved": "at least 2 virtual stages", "zb-v": "2 virtual stages"}.get(kind, "1 virtual stage")
    raise BadInput(f"schedule: {kind} needs {wanted} on each rank, not {given}")


def _with_better_weight_gradients(published: Schedule, durations: Durations) -> Schedule:
    """The published order, unless weight gradients placed by durations end the step sooner.

    They do with fewer micro-batches than the published orders are made for, and where W takes longer than I.
    """
    table = place_weight_gradients(
        published.ranks, published.placement, durations, memory_limit=max(published.peak_activations)
    )
    placed = replace(published, ranks=table)
    costs = StageCosts.uniform(published.num_stages, durations)
    gain_s = simulate(published, costs).step_time_s - simulate(placed, costs).step_time_s
    rounding_s = 1e-9 * (durations.forward + durations.input + durations.weight)
    return placed if gain_s > rounding_s else published
