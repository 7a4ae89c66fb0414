"""A schedule in the terminal: a table of its ranks and, where it fits, a picture of its timeline."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from triaxial.plan.pipeline.simulate import Simulation
from triaxial.plan.pipeline.table import Schedule
from triaxial.plan.pipeline.timeline import Timeline

_STYLES = {"F": "white on blue", "B": "white on green", "I": "black on cyan", "W": "black on yellow"}
_LATER_STAGE = {
    "F": "black on bright_blue",
    "B": "black on bright_green",
    "I": "black on bright_cyan",
    "W": "black on bright_yellow",
}


def schedule_table(schedule: Schedule, simulation: Simulation) -> Table:
    """One row a rank: its stages, actions, the most activations it holds and its bubble."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("rank", "stages", "actions", "peak activations", "bubble"):
        table.add_column(header, justify="right")
    bubbles = simulation.timeline.bubble_per_rank
    for rank, (actions, peak, bubble) in enumerate(zip(schedule.ranks, simulation.peak_activations, bubbles)):
        stages = " ".join(str(stage) for stage, home in enumerate(schedule.placement) if home == rank)
        table.add_row(str(rank), stages, str(len(actions)), str(peak), f"{bubble:.1%}")
    return table


def timeline_text(timeline: Timeline, width: int) -> Text | None:
    """One line a rank, each action as wide as it is long and labelled with kind and micro-batch.

    Returns:
        Nothing if the labels do not fit into `width` characters.
    """
    spans = [span for row in timeline.ranks for span in row]
    gutter = len(str(len(timeline.ranks) - 1)) + 1
    label_width = 1 + len(str(max(span.action.micro_batch for span in spans)))
    shortest_s = min(span.end_s - span.begin_s for span in spans)
    if shortest_s <= 0 or timeline.step_time_s * label_width > shortest_s * (width - gutter):
        return None
    columns_per_s = label_width / shortest_s

    picture = Text()
    for rank, row in enumerate(timeline.ranks):
        picture.append(f"{rank:>{gutter - 1}} ")
        first_stage = min((span.action.stage for span in row), default=0)
        at = 0
        for action, begin_s, end_s in row:
            begin, end = (round((time_s - timeline.begin_s) * columns_per_s) for time_s in (begin_s, end_s))
            picture.append(" " * (begin - at))
            style = _STYLES if action.stage == first_stage else _LATER_STAGE
            picture.append(f"{action.kind}{action.micro_batch}".ljust(end - begin, "-"), style[action.kind])
            at = end
        picture.append("\n")
    return picture
