"""Rehearsal of a plan: every rank a process, every message real, time dilated; and what its steps were made of."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low

from triaxial.measure.crew import run_crew
from triaxial.measure.fabric import Fabric
from triaxial.measure.rehearsal_rank import RankRecord, StepRecord, play
from triaxial.measure.script import Script
from triaxial.parallel.mesh import coordinates
from triaxial.parallel.messages import list_messages
from triaxial.plan.pipeline.schedule import Schedule, build_schedule
from triaxial.plan.pipeline.timeline import Span


@dataclass(frozen=True)
class Rehearsal:
    """A script and how it went. Seconds are of the cluster: measured ones over the dilation."""

    script: Script
    steps_s: tuple[float, ...]
    parts_s: dict[str, float]
    """Of the step that is the median, on the busiest rank; they add up to it."""
    records: tuple[RankRecord, ...]

    @property
    def step_time_s(self) -> float:
        """The median; of an even number, the shorter one in the middle."""
        return median_low(self.steps_s)

    @property
    def error(self) -> float:
        """Of the predicted step time, relative to the rehearsed one."""
        return self.script.predicted.step_time_s / self.step_time_s - 1

    @property
    def predicted_s(self) -> dict[str, float]:
        """The estimate by the same parts."""
        parts = dict(self.script.predicted.time_s)
        update = parts.pop("optimizer") + parts.pop("data")
        return {**{part: parts[part] for part in PARTS[:-1]}, "update": update}


PARTS = ("compute", "exposed_tp", "exposed_pp", "bubble", "exposed_dp", "update")


def rehearse(script: Script, steps: int, tell: Callable[[], None] = lambda: None) -> Rehearsal:
    """Rehearse one step to warm up and then `steps` more; `tell` is called after each.

    Raises:
        BadInput: not root, or a machine that permits no network namespaces.
        NoAnswer: a rank failed.
    """
    world = script.layout.world_size
    with Fabric(world, script.ports) as fabric, tempfile.TemporaryDirectory(prefix="triaxial-") as folder:
        store = str(Path(folder) / "store")
        records = tuple(run_crew(play, fabric.paths, store, script, steps, tell=tell))
    ends = [min(record.steps[step].end_s for record in records) for step in range(steps + 1)]
    lengths = [end - begin for begin, end in pairwise(ends)]
    middle = lengths.index(median_low(lengths))
    parts = step_parts(script, [record.steps[middle + 1] for record in records], ends[middle], ends[middle + 1])
    return Rehearsal(
        script=script,
        steps_s=tuple(seconds / script.dilation for seconds in lengths),
        parts_s={part: seconds / script.dilation for part, seconds in parts.items()},
        records=records,
    )


def step_parts(script: Script, ranks: Sequence[StepRecord], begin_s: float, end_s: float) -> dict[str, float]:
    """Seconds of a step by part, on the rank that was longest in actions; from the first rank's end of one update to the
    first rank's of the next.

    Its waiting is `exposed_pp` as far as the action was over whose message it waited for, and bubble otherwise. So a
    transfer between other ranks that delays this one counts as bubble. What comes after the last action of all ranks,
    until all have their gradients, is `exposed_dp`, but for the exchange between the ends of the pipeline.
    """
    layout = script.layout
    schedule = build_schedule(
        layout.schedule, ranks=layout.pp, micro_batches=script.micro_batches, virtual_stages=layout.vpp
    )
    busiest = max(range(len(ranks)), key=lambda rank: sum(span.end_s - span.begin_s for span in ranks[rank].spans))
    place = coordinates(layout, busiest)
    pipeline = [record for rank, record in enumerate(ranks) if coordinates(layout, rank) | {"pp": place["pp"]} == place]
    mine = ranks[busiest]
    in_actions_s = sum(span.end_s - span.begin_s for span in mine.spans)
    last_end_s = max(record.spans[-1].end_s for record in ranks)
    reduced_at_s = max(record.reduced_at_s for record in ranks)
    pp_s = waited_for_messages_s(schedule, [record.spans for record in pipeline], place["pp"], begin_s)
    outside_s = last_end_s - begin_s - in_actions_s
    tied_s = max(record.tied_at_s for record in ranks) - max(record.complete_at_s for record in ranks)
    return {
        "compute": in_actions_s - mine.tp_s - mine.dp_s,
        "exposed_tp": mine.tp_s,
        "exposed_pp": pp_s + tied_s,
        "bubble": outside_s - pp_s,
        "exposed_dp": mine.dp_s + reduced_at_s - last_end_s - tied_s,
        "update": end_s - reduced_at_s,
    }


def waited_for_messages_s(schedule: Schedule, spans: Sequence[Sequence[Span]], rank: int, begin_s: float) -> float:
    """Seconds that a pipeline rank had nothing to do although the action was over that made its next input."""
    end_s = {span.action: span.end_s for of_rank in spans for span in of_rank}
    producer = {message.consumer: message.producer for message in list_messages(schedule)}
    total, free_at_s = 0.0, begin_s
    for span in spans[rank]:
        if span.action in producer:
            total += max(0.0, span.begin_s - max(free_at_s, end_s[producer[span.action]]))
        free_at_s = span.end_s
    return total
