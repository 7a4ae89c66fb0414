"""A run's recorded step beside what the simulator says of it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from triaxial import BadInput
from triaxial.files import write_atomically
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.plan.pipeline.simulate import simulate
from triaxial.plan.pipeline.timeline import Timeline
from triaxial.report.si import seconds_text
from triaxial.report.timeline import timeline_svg


def read_run(run: Path) -> MeasuredStep:
    """The step that a run recorded.

    Raises:
        BadInput: the folder has no timeline, or a damaged one.
    """
    try:
        return MeasuredStep.from_json((run / "timeline.json").read_bytes())
    except OSError:
        raise BadInput(f"{run} has no timeline.json: `triaxial train` writes it after a run's third step") from None


def predicted_and_measured(measured: MeasuredStep) -> list[tuple[str, Timeline]]:
    """Title and timeline of the prediction from each stage's mean durations, and of what happened."""
    schedule = measured.schedule
    what = f"{schedule.kind}, {schedule.num_micro_batches} micro-batches"
    predicted = simulate(schedule, measured.costs).timeline
    return [
        (f"predicted: {what}, every action at its stage's mean, messages free", predicted),
        (f"measured: step {measured.step + 1}", measured.timeline),
    ]


def draw_run(run: Path) -> None:
    """Write `timeline.svg` beside the recorded step of a run that has a pipeline: predicted above measured."""
    if not (run / "timeline.json").exists():
        return
    measured = read_run(run)
    if measured.schedule.num_ranks > 1:
        write_atomically(run / "timeline.svg", timeline_svg(predicted_and_measured(measured)))


def comparison_table(named: list[tuple[str, Timeline]]) -> Table:
    """Step, bubble and every rank's bubble of each timeline."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for header in ("step", "bubble", *(f"rank {rank}" for rank in range(len(named[0][1].ranks)))):
        table.add_column(header, justify="right")
    for title, timeline in named:
        bubbles = (timeline.bubble_fraction, *timeline.bubble_per_rank)
        table.add_row(
            title.partition(":")[0], seconds_text(timeline.step_time_s), *(f"{bubble:.1%}" for bubble in bubbles)
        )
    return table
