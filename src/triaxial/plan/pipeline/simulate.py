"""When does every action of a schedule begin and end? The table played on paper."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from triaxial import BadInput
from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.table import Schedule
from triaxial.plan.pipeline.timeline import Span, Timeline
from triaxial.plan.pipeline.validity import check_schedule

__all__ = ["Durations", "Simulation", "Span", "StageCosts", "Timeline", "Transfer", "simulate"]

_UNKNOWN = -1.0


@dataclass(frozen=True)
class Durations:
    """Seconds of one virtual stage and micro-batch; a whole backward takes `input + weight`."""

    forward: float = 1.0
    input: float = 1.0
    """The input gradient: what the zero-bubble papers call B."""
    weight: float = 1.0
    """The weight gradient."""


@dataclass(frozen=True)
class Transfer:
    """What passes between two neighbouring stages, each way, for one micro-batch."""

    num_bytes: float = 0.0
    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    @property
    def wire_s(self) -> float:
        """Seconds for which the message keeps the link to itself."""
        return self.num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """What one micro-batch costs on each virtual stage, and what one step costs besides."""

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    """Seconds of the input gradient."""
    weight_s: tuple[float, ...]
    """Seconds of the weight gradient."""
    backward_s: tuple[float, ...] = ()
    """Seconds of a whole backward; empty is `input_s + weight_s`."""
    transfers: tuple[Transfer, ...] = ()
    """Between stage s and s + 1, one fewer than stages; empty is free. Free too between stages of one rank."""
    reduce_s: tuple[float, ...] = ()
    """Seconds of the data-parallel gradient reduction of each stage; empty is none."""

    def __post_init__(self) -> None:
        stages = len(self.forward_s)
        optional = {"backward_s": stages, "transfers": stages - 1, "reduce_s": stages}
        for name, wanted in {"input_s": stages, "weight_s": stages, **optional}.items():
            given = len(getattr(self, name))
            if given != wanted and not (name in optional and given == 0):
                raise BadInput(f"costs of {stages} stages: {name} must have {wanted} entries, not {given}")

    @classmethod
    def uniform(cls, num_stages: int, durations: Durations, transfer: Transfer | None = None) -> StageCosts:
        """The same durations on every virtual stage and the same transfer on every edge."""
        return cls(
            forward_s=(durations.forward,) * num_stages,
            input_s=(durations.input,) * num_stages,
            weight_s=(durations.weight,) * num_stages,
            transfers=() if transfer is None else (transfer,) * (num_stages - 1),
        )


@dataclass(frozen=True)
class Simulation:
    """A predicted step."""

    timeline: Timeline
    reduce_s: tuple[tuple[float, float], ...]
    """Begin and end of each stage's gradient reduction; empty if there is none."""
    peak_activations: tuple[int, ...]
    """The most activations, each of one virtual stage and micro-batch, that each rank holds at once."""

    @property
    def step_time_s(self) -> float:
        """To the end of the last action or gradient reduction."""
        return max([self.timeline.end_s, *(end_s for _, end_s in self.reduce_s)]) - self.timeline.begin_s


def simulate(schedule: Schedule, costs: StageCosts, *, sender_blocked: bool = False) -> Simulation:
    """Predict begin and end of every action.

    A rank starts its next action as soon as it is free and the input has arrived. A message leaves when its action
    ends, waits until the messages before it on the same link (from one rank to another, one direction) have passed,
    occupies the link for bytes / bandwidth and arrives a latency later. A stage's gradient reduction starts with its
    last gradient, beside the rank's other work but after the rank's earlier reductions.

    Args:
        schedule: a table that `check_schedule` accepts.
        costs: seconds and bytes of every virtual stage.
        sender_blocked: the sender stands still until its message has arrived, as with a blocking send.

    Raises:
        BadInput: costs for another number of stages, or a table that cannot run.
    """
    if len(costs.forward_s) != schedule.num_stages:
        raise BadInput(f"costs are of {len(costs.forward_s)} stages, but the schedule has {schedule.num_stages}")
    timeline = _play(schedule, costs, sender_blocked)
    if any(len(spans) < len(actions) for spans, actions in zip(timeline.ranks, schedule.ranks)):
        check_schedule(schedule)  # says why it came to a standstill
    return Simulation(timeline, _reductions(schedule, timeline, costs.reduce_s), schedule.peak_activations)


class _Hop(NamedTuple):
    """How a result gets from one stage to the next."""

    link: int
    wire_s: float
    latency_s: float


def _play(schedule: Schedule, costs: StageCosts, sender_blocked: bool) -> Timeline:
    """Every rank is a process that runs until an input is missing and goes on when another rank has provided it.

    This is the planner's innermost loop, so it keeps to flat lists: about a microsecond an action. Inputs are numbered
    by stage and micro-batch, those of forwards first, then those of backwards. That a rank's own F comes before its B
    and I before W is left to `check_schedule`.
    """
    count, half = schedule.num_micro_batches, schedule.num_stages * schedule.num_micro_batches
    arrived = [_UNKNOWN] * (2 * half)
    arrived[:count] = arrived[2 * half - count :] = [0.0] * count  # first stage's forwards, last stage's backwards
    link_free = [0.0] * schedule.num_ranks**2
    whole_backward = costs.backward_s or tuple(map(sum, zip(costs.input_s, costs.weight_s)))
    down, up = _hops(schedule, costs.transfers)
    # seconds by stage, number of the first input, from an action's input to the input that it provides, hop by stage
    tables = {
        "F": (costs.forward_s, 0, count, down),
        "B": (whole_backward, half, -count, up),
        "I": (costs.input_s, half, -count, up),
    }
    waiting: dict[int, int] = {}  # input: rank
    runnable = deque(range(schedule.num_ranks))

    def process(actions: Sequence[Action], spans: list[Span]) -> Iterator[int]:
        now = 0.0
        for action in actions:
            kind, stage, micro_batch = action
            begin = now
            if kind == "W":
                now += costs.weight_s[stage]
                spans.append(Span(action, begin, now))
                continue
            seconds, first_input, step, hops = tables[kind]
            needed = first_input + stage * count + micro_batch
            if arrived[needed] == _UNKNOWN:
                yield needed
            if begin < arrived[needed]:
                begin = arrived[needed]
            now = begin + seconds[stage]
            spans.append(Span(action, begin, now))
            if hop := hops[stage]:
                link, wire_s, latency_s = hop
                leaves = link_free[link]
                if leaves < now:
                    leaves = now
                link_free[link] = leaves = leaves + wire_s
                provided = needed + step
                arrived[provided] = leaves + latency_s
                if provided in waiting:
                    runnable.append(waiting.pop(provided))
                if sender_blocked:
                    now = arrived[provided]

    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    processes = [process(*pair) for pair in zip(schedule.ranks, spans)]
    while runnable:
        rank = runnable.popleft()
        missing = next(processes[rank], None)
        if missing is not None:
            waiting[missing] = rank
    return Timeline(tuple(map(tuple, spans)))


def _hops(schedule: Schedule, transfers: Sequence[Transfer]) -> tuple[list[_Hop | None], list[_Hop | None]]:
    """For each stage, the hop of its forward result to the next stage and of its gradient to the previous one."""
    down: list[_Hop | None] = []
    up: list[_Hop | None] = [None]
    for stage, (here, there) in enumerate(pairwise(schedule.placement)):
        wire_s, latency_s = 0.0, 0.0
        if transfers and here != there:
            wire_s, latency_s = transfers[stage].wire_s, transfers[stage].latency_s
        down.append(_Hop(here * schedule.num_ranks + there, wire_s, latency_s))
        up.append(_Hop(there * schedule.num_ranks + here, wire_s, latency_s))
    return [*down, None], up


def _reductions(schedule: Schedule, timeline: Timeline, reduce_s: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Begin and end of each stage's gradient reduction; a rank runs its own one after another as they become ready."""
    if not reduce_s:
        return ()
    spans: list[tuple[float, float]] = [(0.0, 0.0)] * schedule.num_stages
    for actions in timeline.ranks:
        last_gradient = {span.action.stage: span.end_s for span in actions if span.action.kind in "BW"}
        free = 0.0
        for stage, ready in sorted(last_gradient.items(), key=itemgetter(1)):
            begin = max(free, ready)
            free = begin + reduce_s[stage]
            spans[stage] = (begin, free)
    return tuple(spans)
