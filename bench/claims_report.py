"""The claims about links as Markdown, and as pictures."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import torch

from claims_lab import NODES, ONE_REPLICA, RANKS, TIE, TWO_SEQUENCES, AtRate, Job
from claims_picture import Line, lines_svg


@dataclass(frozen=True)
class Flip:
    """Where one layout stops being faster than another."""

    below: str
    above: str
    measured_bytes_per_s: float
    predicted_bytes_per_s: float | None

    @property
    def factor(self) -> float:
        """How far the prediction is off, as a ratio of at least 1."""
        if self.predicted_bytes_per_s is None:
            return math.inf
        ratio = self.predicted_bytes_per_s / self.measured_bytes_per_s
        return max(ratio, 1 / ratio)

    def __str__(self) -> str:
        measured = f"{self.measured_bytes_per_s * 8e-6:,.0f} Mbit/s"
        if self.predicted_bytes_per_s is None:
            return f"From *{self.below}* to *{self.above}*: measured at {measured}, not predicted."
        predicted = f"{self.predicted_bytes_per_s * 8e-6:,.0f} Mbit/s"
        return f"From *{self.below}* to *{self.above}*: measured at {measured}, predicted at {predicted} ({self.factor:.2f} x)."


def report(one: Sequence[AtRate], two: Sequence[AtRate], flips: Sequence[Flip]) -> str:
    """All tables."""
    errors = [abs(at.predicted[name] / at.measured[name] - 1) for at in (*one, *two) for name in at.measured]
    machine = f"{os.cpu_count()} cores, Linux {platform.release()}, torch {torch.__version__}"
    return "\n".join(
        [
            f"`python bench/claims.py --keep FOLDER` on {date.today():%Y-%m-%d}, {machine}. {NODES} nodes of {RANKS} "
            "ranks; `tiny-byte` with 8 layers, fp32. "
            "Seconds a step, measured (predicted from the probe at that rate); bold: the fastest, and what ties with it "
            f"(within {TIE:.0%}). Median error of the {len(errors)} predictions: {statistics.median(errors):.0%}.",
            "",
            f"### {_work(ONE_REPLICA)}: one replica needs all four ranks",
            "",
            *_table(one),
            "",
            f"### {_work(TWO_SEQUENCES)}: two replicas can share them",
            "",
            *_table(two),
            "",
            *(f"- {flip}" for flip in flips),
            "",
        ]
    )


def _work(job: Job) -> str:
    return f"{job.sequences} sequence{'s' * (job.sequences > 1)} of {job.seq_len:,} tokens a step"


def _table(found: Sequence[AtRate]) -> list[str]:
    names = list(found[0].measured)
    rows = []
    for at in found:
        cells = [_cell(at, name) for name in names]
        rows.append([at.rate, *cells, at.chosen, f"{at.regret:.0%}"])
    return _markdown(["between nodes", *names, "planner's choice", "regret"], rows)


def _cell(at: AtRate, name: str) -> str:
    text = f"{at.measured[name]:.2f}"
    return (f"**{text}**" if name in at.winners else text) + f" ({at.predicted[name]:.2f})"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def pictures(one: Sequence[AtRate], two: Sequence[AtRate]) -> Mapping[str, str]:
    """SVG by name."""
    return {
        "claims-one-sequence": _seconds(f"{_work(ONE_REPLICA)}", one),
        "claims-two-sequences": _seconds(f"{_work(TWO_SEQUENCES)}", two),
    }


def _seconds(title: str, found: Sequence[AtRate]) -> str:
    names = list(found[0].measured)
    lines = [Line(name, [at.measured[name] for at in found], [at.predicted[name] for at in found]) for name in names]
    return lines_svg(f"Seconds a step: {title}", [at.rate for at in found], lines)
