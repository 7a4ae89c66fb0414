"""`Action`: one thing a pipeline rank does, and its one-word text form."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from triaxial import BadInput

ActionKind = Literal["F", "B", "I", "W"]

_TEXT = re.compile(r"(\d+)([FBIW])(\d+)")


class Action(NamedTuple):
    """Forward `F`, whole backward `B`, input gradient `I` or weight gradient `W` of one stage and micro-batch.

    `I` and `W` together do what `B` does (arXiv 2401.10241 calls them B and W). The text form is stage, kind,
    micro-batch: `3F12`, the notation that torch's pipeline tables use too.
    """

    kind: ActionKind
    stage: int
    """Virtual stage, counted from 0 over the whole pipeline."""
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


def parse_action(text: str) -> Action:
    """Read `3F12`.

    Raises:
        BadInput: the text is not a stage, one of F, B, I, W and a micro-batch.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise BadInput(f"schedule: {text!r} is no action; write stage, F, B, I or W, micro-batch, like 3F12")
    stage, kind, micro_batch = match.groups()
    return Action(kind, int(stage), int(micro_batch))  # type: ignore[arg-type]
