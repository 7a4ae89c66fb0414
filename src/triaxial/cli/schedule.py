"""`triaxial schedule`: look at a pipeline schedule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import click
from rich.console import Console

from triaxial import BadInput
from triaxial.files import write_atomically
from triaxial.plan.layout import ScheduleKind
from triaxial.plan.pipeline.schedule import Schedule, build_schedule
from triaxial.plan.pipeline.simulate import Durations, Simulation, StageCosts, simulate
from triaxial.plan.pipeline.table import read_schedule
from triaxial.plan.pipeline.timeline import Timeline
from triaxial.plan.pipeline.validity import check_schedule
from triaxial.report.run_timeline import comparison_table, predicted_and_measured, read_run
from triaxial.report.schedule_text import schedule_table, timeline_text
from triaxial.report.si import seconds_text
from triaxial.report.timeline import timeline_svg
from triaxial.report.trace import chrome_trace

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(name="schedule")
@click.option("--kind", type=click.Choice(get_args(ScheduleKind)), help="The schedule.")
@click.option("--stages", type=click.IntRange(min=1), help="Pipeline ranks.")
@click.option("--micro-batches", type=click.IntRange(min=1), help="Micro-batches of one step.")
@click.option("--virtual-stages", type=click.IntRange(min=1), help="Stages on each rank (interleaved: 2, or more).")
@click.option(
    "--durations",
    metavar="F,B,W",
    default="1,1,1",
    show_default=True,
    help="Seconds that a rank takes for one micro-batch's forward, input gradient and weight gradient; a whole "
    "backward takes B + W, and each of a rank's virtual stages its even part.",
)
@click.option("--memory-limit", type=click.IntRange(min=1), help="Activations that a rank may hold at once.")
@click.option("--table", type=_FILE, help="Take this schedule instead: JSON, as --json writes it.")
@click.option("--run", type=click.Path(path_type=Path), help="Show the step that this training run recorded.")
@click.option("--svg", type=_FILE, help="Write the timeline as a picture.")
@click.option("--trace", type=_FILE, help="Write the timeline for Perfetto or chrome://tracing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    kind: ScheduleKind | None,
    stages: int | None,
    micro_batches: int | None,
    virtual_stages: int | None,
    durations: str,
    memory_limit: int | None,
    table: Path | None,
    run: Path | None,
    svg: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Show who does what when under a pipeline schedule, and what its bubble is.

    Name a known schedule by --kind, --stages and --micro-batches, or give one of your own with --table. Transfers are
    free here. Actions are written like 3F12: stage 3, forward, micro-batch 12; B is a whole backward, I the input
    gradient (B in the zero-bubble papers) and W the weight gradient. With --run, what a training run measured stands
    beside what the simulator makes of its stages' mean durations.
    """
    numbers = (kind, stages, micro_batches, virtual_stages, memory_limit)
    if run is not None:
        if any(option is not None for option in (*numbers, table)):
            raise BadInput("--run says all about the schedule: leave out --table, --kind and its numbers")
        _show_run(run, svg, trace, as_json)
        return
    of_rank = _parse_durations(durations)
    if table is not None:
        if any(option is not None for option in numbers):
            raise BadInput("--table says all about the schedule: leave out --kind and the numbers that go with it")
        schedule = read_schedule(table)
    elif kind is None or stages is None or micro_batches is None:
        raise BadInput("name a schedule by --kind, --stages and --micro-batches, or give one with --table or --run")
    else:
        schedule = build_schedule(
            kind,
            ranks=stages,
            micro_batches=micro_batches,
            virtual_stages=virtual_stages,
            durations=of_rank,
            memory_limit=memory_limit,
        )
    check_schedule(schedule)
    simulation = simulate(schedule, StageCosts.uniform(schedule.num_stages, _per_stage(of_rank, schedule)))

    _write_pictures([(_title(schedule), simulation.timeline)], svg, trace)
    if as_json:
        print(json.dumps(_document(schedule, simulation)))
    else:
        _print_text(Console(), schedule, simulation)


def _show_run(run: Path, svg: Path | None, trace: Path | None, as_json: bool) -> None:
    measured = read_run(run)
    named = predicted_and_measured(measured)
    _write_pictures(named, svg, trace)
    if not as_json:
        console = Console()
        console.print(f"{_title(measured.schedule)}, step {measured.step + 1} of {run}", style="bold", highlight=False)
        console.print(comparison_table(named))
        return
    parts = {
        name: {
            "step_time": timeline.step_time_s,
            "bubble_fraction": timeline.bubble_fraction,
            "ranks": [{"bubble_fraction": bubble} for bubble in timeline.bubble_per_rank],
        }
        for name, (_, timeline) in zip(("predicted", "measured"), named, strict=True)
    }
    print(json.dumps({"kind": measured.schedule.kind, "step": measured.step, **parts}))


def _write_pictures(named: list[tuple[str, Timeline]], svg: Path | None, trace: Path | None) -> None:
    if svg is not None:
        write_atomically(svg, timeline_svg(named))
    if trace is not None:
        write_atomically(trace, json.dumps(chrome_trace(named)))


def _parse_durations(text: str) -> Durations:
    try:
        forward, of_input, of_weight = (float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--durations {text!r} is not three numbers of seconds like 1,1,1") from None
    if not all(0 <= part < math.inf for part in (forward, of_input, of_weight)) or forward + of_input + of_weight == 0:
        raise BadInput(f"--durations {text}: give seconds of 0 or more, not all 0")
    return Durations(forward, of_input, of_weight)


def _per_stage(of_rank: Durations, schedule: Schedule) -> Durations:
    part = schedule.num_ranks / schedule.num_stages
    return Durations(of_rank.forward * part, of_rank.input * part, of_rank.weight * part)


def _title(schedule: Schedule) -> str:
    return f"{schedule.kind}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"


def _document(schedule: Schedule, simulation: Simulation) -> dict[str, object]:
    """The table itself, which --table reads back, and what came out."""
    timeline = simulation.timeline
    rows = zip(schedule.ranks, simulation.peak_activations, timeline.bubble_per_rank)
    return {
        "kind": schedule.kind,
        "num_micro_batches": schedule.num_micro_batches,
        "placement": schedule.placement,
        "step_time": simulation.step_time_s,
        "bubble_fraction": timeline.bubble_fraction,
        **({"zero_bubble_rate": timeline.bubble_rate} if schedule.splits_backward else {}),
        "ranks": [
            {"actions": [str(action) for action in actions], "peak_activations": peak, "bubble_fraction": bubble}
            for actions, peak, bubble in rows
        ],
    }


def _print_text(console: Console, schedule: Schedule, simulation: Simulation) -> None:
    timeline = simulation.timeline
    console.print(_title(schedule), style="bold", highlight=False)
    console.print(
        f"step {seconds_text(simulation.step_time_s)}, "
        f"bubble {timeline.bubble_fraction:.1%} of it (1 - busy / step, mean over ranks)",
        highlight=False,
    )
    if schedule.splits_backward:
        formula = "(cost - m (TF + TB + TW)) / cost"
        console.print(f"bubble rate of the zero-bubble papers {timeline.bubble_rate:.1%}: {formula}", highlight=False)
    console.print()
    console.print(schedule_table(schedule, simulation))
    console.print()
    picture = timeline_text(timeline, console.width)
    console.print(picture or "The timeline is too wide to draw here; --svg FILE draws it.", highlight=False)
