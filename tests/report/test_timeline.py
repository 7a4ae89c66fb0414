"""Pictures of timelines: what is in them, that they stay small, and that any name is drawn as it is written."""

from __future__ import annotations

import io
import json
import math
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.schedule import Durations, ScheduleKind, build_schedule
from triaxial.plan.pipeline.simulate import Span, StageCosts, Timeline, simulate
from triaxial.report.schedule_text import timeline_text
from triaxial.report.si import seconds_text, tick_step
from triaxial.report.timeline import timeline_svg
from triaxial.report.trace import chrome_trace

SVG = "{http://www.w3.org/2000/svg}"


def predicted(kind: ScheduleKind, ranks: int, micro_batches: int, seconds: float = 1.0) -> Timeline:
    schedule = build_schedule(kind, ranks=ranks, micro_batches=micro_batches)
    costs = StageCosts.uniform(schedule.num_stages, Durations(seconds, seconds, seconds))
    return simulate(schedule, costs).timeline


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def boxes(svg: str, colour: str) -> list[tuple[float, float, float]]:
    """x, y and width of every box of one colour."""
    outlines = [
        path.get("d", "") for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if path.get("fill") == colour
    ]
    found = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", "".join(outlines))
    return [(float(x), float(y), float(width)) for x, y, width in found]


def test_every_action_is_a_box_with_its_micro_batch() -> None:
    svg = timeline_svg([("1f1b", predicted("1f1b", 2, 3))])
    forward, backward = boxes(svg, "#3d7bd9"), boxes(svg, "#2f9e62")
    assert (len(forward), len(backward)) == (6, 6)
    unit = (1200 - 64 - 72) / 12
    assert forward[0] == pytest.approx((64, 26, unit), abs=0.06)
    assert max(x + width for x, _, width in backward) == pytest.approx(1200 - 72, abs=0.2)
    for micro_batch in "012":
        assert texts(svg).count(micro_batch) == 4 + (micro_batch == "0"), "the axis has a 0 too"


def test_figures_stand_beside_the_picture() -> None:
    timeline = predicted("1f1b", 8, 32, seconds=0.005)
    written = texts(timeline_svg([("1f1b", timeline)]))
    assert "step 585 ms, bubble 17.9%" in written
    assert written.count("17.9%") == 8
    assert {"rank 0", "rank 7", "F forward", "B backward", "idle (bubble)", "500 ms"} <= set(written)
    assert "W weight gradient" not in written, "the legend names what is drawn"


def test_predicted_and_measured_share_the_time_scale() -> None:
    fast, slow = predicted("1f1b", 2, 4, seconds=1.0), predicted("1f1b", 2, 4, seconds=2.0)
    svg = timeline_svg([("predicted", fast), ("measured", slow)])
    forward = boxes(svg, "#3d7bd9")
    assert {round(width, 1) for _, y, width in forward if y < 80} == {35.5}
    assert {round(width, 1) for _, y, width in forward if y > 80} == {70.9}
    assert texts(svg).index("predicted") < texts(svg).index("measured")


def test_a_measured_timeline_may_begin_at_any_time() -> None:
    late = Timeline(((Span(Action("F", 0, 0), 1e6, 1e6 + 2), Span(Action("B", 0, 0), 1e6 + 3, 1e6 + 4)),))
    assert boxes(timeline_svg([("measured", late)]), "#3d7bd9") == [(64, 26, 532)]
    assert chrome_trace([("measured", late)])["traceEvents"][2]["ts"] == 0


def test_virtual_stages_differ_in_shade() -> None:
    svg = timeline_svg([("zb-v", predicted("zb-v", 2, 4))])
    assert len(boxes(svg, "#3d7bd9")) == 8
    assert len(boxes(svg, "#94b6ea")) == 8
    assert "lighter: later virtual stage of the rank" in texts(svg)


def test_names_are_escaped() -> None:
    name = '<b>tp & "pp"</b>'
    assert name in texts(timeline_svg([(name, predicted("1f1b", 1, 1))]))


def test_64_ranks_and_512_micro_batches_stay_a_small_file() -> None:
    timeline = predicted("1f1b", 64, 512)
    svg = timeline_svg([("predicted", timeline), ("measured", timeline)])
    assert len(svg) < 300_000
    assert texts(svg).count("11.0%") == 128


def test_where_actions_are_too_thin_their_colours_are_mixed_with_idling() -> None:
    forwards = tuple(Span(Action("F", 0, m), m + 0.0, m + 1.0) for m in range(1000))
    backwards = tuple(Span(Action("B", 0, m), 1000 + 2.0 * m, 1001 + 2.0 * m) for m in range(500))
    svg = timeline_svg([("dense", Timeline((forwards + backwards,)))])
    (start, _, width), *_ = boxes(svg, "#4878d8")
    assert (start, width) == pytest.approx((64, 1064 / 2), abs=5), "forwards without a gap: their colour, rounded"
    assert sum(width for _, _, width in boxes(svg, "#90c0a8")) > 500, "backwards half the time: half green, half idle"


def test_an_idle_rank_is_drawn_empty() -> None:
    timeline = Timeline(((Span(Action("F", 0, 0), 0.0, 1.0),), ()))
    assert timeline.bubble_per_rank == (0.0, 1.0)
    assert "100.0%" in texts(timeline_svg([("half", timeline)]))


def test_trace_events() -> None:
    trace = chrome_trace([("predicted", predicted("1f1b", 2, 1)), ("measured", predicted("1f1b", 2, 1))])
    assert json.loads(json.dumps(trace)) == trace
    events = trace["traceEvents"]
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == ["predicted", "measured"]
    assert [event["args"]["name"] for event in events if event["name"] == "thread_name"] == ["rank 0", "rank 1"] * 2
    actions = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert actions[:4] == [
        (0, 0, "0F0", 0.0, 1e6),
        (0, 0, "0B0", 4e6, 2e6),
        (0, 1, "1F0", 1e6, 1e6),
        (0, 1, "1B0", 2e6, 2e6),
    ]
    assert len(actions) == 8


def test_text_picture() -> None:
    picture = timeline_text(predicted("1f1b", 2, 2), width=80)
    assert picture is not None
    assert picture.plain == "0 F0F1    B0--  B1--\n1   F0B0--F1B1--\n"
    assert timeline_text(predicted("1f1b", 2, 2), width=19) is None, "9 units of 2 characters and 2 for the rank"
    assert timeline_text(predicted("1f1b", 2, 2), width=20) is not None


def test_text_picture_has_colours() -> None:
    picture = timeline_text(predicted("zb-v", 1, 1), width=80)
    assert picture is not None
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    terminal.print(picture)
    assert "44mF0" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "104mF0" in terminal.file.getvalue(), "the second virtual stage is brighter"  # type: ignore[attr-defined]


def test_no_text_picture_of_actions_without_length() -> None:
    assert timeline_text(Timeline(((Span(Action("F", 0, 0), 0.0, 0.0),),)), width=80) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0"),
        (1.0, "1 s"),
        (0.9999, "1 s"),
        (0.117, "117 ms"),
        (0.0025, "2.5 ms"),
        (3.14159e-6, "3.14 µs"),
        (5e-9, "5 ns"),
        (1725.0, "1725 s"),
    ],
)
def test_seconds_as_people_read_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("length", "step"), [(10, 1), (11, 2), (0.585, 0.1), (0.45, 0.05), (1725, 200)])
def test_tick_step(length: float, step: float) -> None:
    assert math.isclose(tick_step(length, 10), step)
