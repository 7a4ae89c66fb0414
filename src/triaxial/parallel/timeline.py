"""Measured timelines: the spans that every rank of a pipeline recorded, put together on one clock."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence

import torch

from triaxial.parallel.host import machine_identity
from triaxial.parallel.mesh import Axis
from triaxial.plan.pipeline.schedule import Schedule
from triaxial.plan.pipeline.timeline import Span, Timeline

_ROUNDS = 9
"""Barriers after which clocks are compared; the median leaves out those that were disturbed."""


def gather_timeline(schedule: Schedule, axis: Axis, spans: Sequence[Span], device: torch.device) -> Timeline:
    """One run of the table as all ranks of the pipeline `axis` saw it, in seconds of the first rank's clock.

    Every rank of the axis calls it with its own spans. Ranks of one machine share their clock; those of several are
    aligned at a barrier, so that between machines the picture is true to about the time that a barrier takes.
    """
    longest = max(map(len, schedule.ranks))
    times = torch.full((longest, 2), math.nan, dtype=torch.float64, device=device)
    ahead_s = _clock_lead(axis, device)
    for i, span in enumerate(spans):
        times[i, 0], times[i, 1] = span.begin_s - ahead_s, span.end_s - ahead_s
    everyone = axis.all_gather(times).view(axis.size, longest, 2).tolist()
    return Timeline(
        tuple(
            tuple(Span(action, begin, end) for action, (begin, end) in zip(actions, rows))
            for actions, rows in zip(schedule.ranks, everyone)
        )
    )


def _clock_lead(axis: Axis, device: torch.device) -> float:
    """Seconds by which this rank's clock is ahead of the axis's first rank's."""
    machines = axis.all_gather(torch.tensor([_machine()], dtype=torch.int64, device=device)).tolist()
    if len(set(machines)) == 1:
        return 0.0
    readings = []
    for _ in range(_ROUNDS):
        axis.all_reduce(torch.zeros(1, device=device)).item()  # all ranks leave it at about the same time
        readings.append(time.perf_counter())
    mine = torch.tensor([readings], dtype=torch.float64, device=device)
    everyone = axis.all_gather(mine)
    return float((everyone[axis.index] - everyone[0]).median())


def _machine() -> int:
    """A number that the processes of one running machine, and only those, have in common."""
    return zlib.crc32(machine_identity().encode())
