"""A step that was run: its table and its timeline, as a file, and what the simulator makes of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from pydantic import BaseModel, ValidationError

from triaxial import BadInput
from triaxial.plan.pipeline.action import ActionKind
from triaxial.plan.pipeline.simulate import StageCosts
from triaxial.plan.pipeline.table import Schedule
from triaxial.plan.pipeline.timeline import Span, Timeline


@dataclass(frozen=True)
class MeasuredStep:
    """One training step: what the table ordered and when it happened."""

    step: int
    """Counted from 0."""
    schedule: Schedule
    timeline: Timeline

    @property
    def costs(self) -> StageCosts:
        """The mean seconds of each kind of action on each stage; messages are free.

        Simulated, they say how long the step would take if every action took its mean and nothing but actions took
        time: what is missing from the measured step went to messages, to stragglers and to noise.
        """
        seconds: dict[tuple[ActionKind, int], list[float]] = defaultdict(list)
        for spans in self.timeline.ranks:
            for action, begin_s, end_s in spans:
                seconds[action.kind, action.stage].append(end_s - begin_s)

        def means(kind: ActionKind) -> tuple[float, ...]:
            return tuple(fmean(seconds[kind, stage] or [0.0]) for stage in range(self.schedule.num_stages))

        return StageCosts(forward_s=means("F"), input_s=means("I"), weight_s=means("W"), backward_s=means("B"))

    def to_json(self) -> str:
        """The table as `Schedule.to_json` writes it, with the times of every action; also `--table` reads it."""
        ranks = tuple(
            _Rank(
                actions=tuple(str(span.action) for span in spans),
                begin_s=tuple(span.begin_s for span in spans),
                end_s=tuple(span.end_s for span in spans),
            )
            for spans in self.timeline.ranks
        )
        table = self.schedule
        file = _File(
            step=self.step,
            kind=table.kind,
            num_micro_batches=table.num_micro_batches,
            placement=table.placement,
            ranks=ranks,
        )
        return file.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> MeasuredStep:
        """Read what `to_json` wrote.

        Raises:
            BadInput: no such file, or times that are missing or run backwards.
        """
        schedule = Schedule.from_json(text)
        try:
            file = _File.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"timeline: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        ranks = []
        for number, (actions, rank) in enumerate(zip(schedule.ranks, file.ranks)):
            if not len(actions) == len(rank.begin_s) == len(rank.end_s):
                raise BadInput(f"timeline: rank {number} has {len(actions)} actions but not as many begins and ends")
            times = [time_s for pair in zip(rank.begin_s, rank.end_s) for time_s in pair]
            if any(later < earlier for earlier, later in pairwise(times)):
                raise BadInput(f"timeline: the times of rank {number} run backwards")
            ranks.append(tuple(map(Span, actions, rank.begin_s, rank.end_s)))
        return cls(file.step, schedule, Timeline(tuple(ranks)))


class _Rank(BaseModel):
    actions: tuple[str, ...]
    begin_s: tuple[float, ...]
    end_s: tuple[float, ...]


class _File(BaseModel):
    step: int
    kind: str
    num_micro_batches: int
    placement: tuple[int, ...]
    ranks: tuple[_Rank, ...]
