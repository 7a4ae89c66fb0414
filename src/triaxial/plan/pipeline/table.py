"""`Schedule`: who does what in which order, as a table that is simulated, executed and drawn alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from triaxial import BadInput
from triaxial.plan.pipeline.action import Action, parse_action


@dataclass(frozen=True)
class Schedule:
    """For each pipeline rank, its actions in order. A rank starts an action once it is free and the inputs are there.

    F(s, m) needs F(s-1, m). B or I(s, m) needs F(s, m) and B or I(s+1, m). W(s, m) needs I(s, m).
    """

    kind: str
    """The generator's name, or any name for a table of one's own."""
    num_micro_batches: int
    placement: tuple[int, ...]
    """The rank of each virtual stage."""
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Virtual stages of the whole pipeline."""
        return len(self.placement)

    @property
    def splits_backward(self) -> bool:
        """Whether input and weight gradients are actions of their own."""
        return any(action.kind == "W" for actions in self.ranks for action in actions)

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """The most activations, each of one virtual stage and micro-batch, that each rank holds at once.

        One is held from its forward to its whole backward or its weight gradient.
        """
        return tuple(_peak(actions) for actions in self.ranks)

    def to_json(self) -> str:
        """The table as one JSON object; actions are written like `3F12`."""
        ranks = tuple(_TableRank(actions=tuple(map(str, actions))) for actions in self.ranks)
        table = _Table(kind=self.kind, num_micro_batches=self.num_micro_batches, placement=self.placement, ranks=ranks)
        return table.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Schedule:
        """Read what `to_json` or `triaxial schedule --json` wrote, or a table of one's own.

        Keys that are not of the table are passed over. Whether the table can run, `check_schedule` says.

        Raises:
            BadInput: no JSON, a field missing or of the wrong type, or a malformed action.
        """
        try:
            table = _Table.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BadInput(f"schedule table: {where + ': ' if where else ''}{first['msg']}") from None
        ranks = tuple(tuple(map(parse_action, rank.actions)) for rank in table.ranks)
        return cls(table.kind, table.num_micro_batches, table.placement, ranks)


def read_schedule(path: Path) -> Schedule:
    """The table in a file. Whether it can run, `check_schedule` says.

    Raises:
        BadInput: no such file, or what `Schedule.from_json` refuses.
    """
    try:
        return Schedule.from_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


def _peak(actions: tuple[Action, ...]) -> int:
    change = {"F": 1, "B": -1, "I": 0, "W": -1}
    return max(accumulate(change[action.kind] for action in actions), default=0)


class _TableRank(BaseModel):
    actions: tuple[str, ...]


class _Table(BaseModel):
    """The JSON form of `Schedule`."""

    kind: str = "own"
    num_micro_batches: PositiveInt
    placement: tuple[NonNegativeInt, ...]
    ranks: tuple[_TableRank, ...]
