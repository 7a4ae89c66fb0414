"""Timelines as pictures: several above each other in one SVG, on one time scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from triaxial.plan.pipeline.action import ActionKind
from triaxial.plan.pipeline.timeline import Span, Timeline
from triaxial.report.si import seconds_text, tick_step

_KINDS: dict[ActionKind, tuple[str, str]] = {
    "F": ("#3d7bd9", "forward"),
    "B": ("#2f9e62", "backward"),
    "I": ("#1aa3a3", "input gradient"),
    "W": ("#e0902f", "weight gradient"),
}
_IDLE = "#eceff3"
_INK = "#1f2933"
_FAINT = "#7b8794"

_WIDTH, _LEFT, _RIGHT = 1200, 64, 72
_CHART = _WIDTH - _LEFT - _RIGHT
_TITLE, _AXIS, _LEGEND, _GAP = 26, 26, 30, 14
_DIGIT = 6.2  # width of a digit at the size that micro-batches are written in
_THIN, _COLUMN = 3.0, 5.0  # where most actions are thinner than _THIN, columns of this width mix their colours
_MIX_STEP = 24  # of 255


def timeline_svg(named: Sequence[tuple[str, Timeline]]) -> str:
    """Draw timelines above each other, such as predicted above measured, all on the same time scale.

    One row is one pipeline rank; at its end stands its bubble. The colour tells forward, backward, input and weight
    gradient apart, the shade a rank's virtual stages; the number is the micro-batch, where it fits. The size stays
    bounded: where actions are too thin to see, their colours are mixed.

    Args:
        named: title and timeline, topmost first. At least one.
    """
    scale = _CHART / max(max(timeline.step_time_s for _, timeline in named), 1e-12)
    heights = [_TITLE + len(timeline.ranks) * _row_height(timeline) + _GAP for _, timeline in named]
    height = sum(heights) + _AXIS + _LEGEND
    svg = Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        width=str(_WIDTH),
        height=str(height),
    )
    svg.set("font-family", "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif")
    SubElement(svg, "rect", width="100%", height="100%", fill="#ffffff")
    top = 0
    for (name, timeline), own_height in zip(named, heights):
        _draw_timeline(svg, name, timeline, top, scale)
        top += own_height
    _draw_axis(svg, top - _GAP, scale)
    _draw_legend(svg, [timeline for _, timeline in named], top + _AXIS)
    indent(svg, space="")
    return tostring(svg, encoding="unicode") + "\n"


def _row_height(timeline: Timeline) -> int:
    return 22 if len(timeline.ranks) <= 16 else 13


@dataclass(frozen=True)
class _Box:
    """A coloured stretch of a row: seconds from the timeline's begin, and the micro-batch if it is one action."""

    begin_s: float
    end_s: float
    colour: str
    micro_batch: int | None = None


def _draw_timeline(svg: Element, name: str, timeline: Timeline, top: int, scale: float) -> None:
    summary = f"step {seconds_text(timeline.step_time_s)}, bubble {timeline.bubble_fraction:.1%}"
    _text(svg, name, _LEFT, top + 18, size=14, weight="600")
    _text(svg, summary, _LEFT + _CHART, top + 18, anchor="end")
    _text(svg, "bubble", _WIDTH - 8, top + 18, anchor="end", fill=_FAINT)
    height = _row_height(timeline)
    y = top + _TITLE
    idle = [f"M{_LEFT} {y + row * height}h{_CHART}v{height - 2}h-{_CHART}z" for row in range(len(timeline.ranks))]
    SubElement(svg, "path", d="".join(idle), fill=_IDLE)

    # One path for all boxes that look alike keeps the file small; only single actions are set apart by a white edge.
    outlines: dict[tuple[str, str], list[str]] = defaultdict(list)
    numbers = Element("g", {"font-size": "10", "fill": "#ffffff", "text-anchor": "middle"})
    for rank, (spans, bubble) in enumerate(zip(timeline.ranks, timeline.bubble_per_rank)):
        row = y + rank * height
        for box in _boxes(spans, timeline.begin_s, scale):
            x, width = _LEFT + box.begin_s * scale, (box.end_s - box.begin_s) * scale
            edge = "none" if box.micro_batch is None else "#ffffff"
            outlines[box.colour, edge].append(f"M{x:.1f} {row}h{width:.1f}v{height - 2}h-{width:.1f}z")
            if box.micro_batch is not None and width >= _DIGIT * len(str(box.micro_batch)) + 3 and height > 16:
                label = SubElement(numbers, "text", x=f"{x + width / 2:.1f}", y=f"{row + height / 2 + 2.5:.1f}")
                label.text = str(box.micro_batch)
        middle = row + height // 2 + 3
        size = 12 if height > 16 else 9
        _text(svg, f"rank {rank}", _LEFT - 8, middle, anchor="end", size=size)
        _text(svg, f"{bubble:.1%}", _WIDTH - 8, middle, anchor="end", size=size)
    for (colour, edge), outline in outlines.items():
        SubElement(svg, "path", {"d": "".join(outline), "fill": colour, "stroke": edge, "stroke-width": "0.6"})
    svg.append(numbers)


def _boxes(spans: Sequence[Span], origin_s: float, scale: float) -> Iterator[_Box]:
    """What to draw of one rank: each action, or columns if most actions would be too thin."""
    stages = sorted({span.action.stage for span in spans})
    colours = {
        (kind, stage): _shade(colour, stages.index(stage), len(stages))
        for kind, (colour, _) in _KINDS.items()
        for stage in stages
    }
    actions = [
        _Box(begin - origin_s, end - origin_s, colours[action.kind, action.stage], action.micro_batch)
        for action, begin, end in spans
    ]
    widths = sorted((box.end_s - box.begin_s) * scale for box in actions)
    if not widths or widths[len(widths) // 2] >= _THIN:
        return iter(actions)
    return _columns(actions, _COLUMN / scale)


def _columns(boxes: Sequence[_Box], column_s: float) -> Iterator[_Box]:
    """For each column the mix of what happens in it, idling included; neighbours that look alike become one box."""
    seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for box in boxes:
        for column in range(int(box.begin_s / column_s), int(box.end_s / column_s) + 1):
            overlap = min(box.end_s, (column + 1) * column_s) - max(box.begin_s, column * column_s)
            seconds[column][box.colour] += max(0.0, overlap)
    mixes = {}
    for column, share in seconds.items():
        mixes[column] = _mix({**share, _IDLE: max(0.0, column_s - sum(share.values()))})
    for colour, run in groupby(sorted(mixes), key=mixes.__getitem__):
        columns = list(run)
        yield _Box(columns[0] * column_s, (columns[-1] + 1) * column_s, colour)


def _mix(weights: Mapping[str, float]) -> str:
    """The weighted mean of colours, rounded so that what looks alike is alike."""
    total = sum(weights.values())
    channels = (sum(int(colour[at : at + 2], 16) * weight for colour, weight in weights.items()) for at in (1, 3, 5))
    return "#" + "".join(f"{min(255, round(channel / total / _MIX_STEP) * _MIX_STEP):02x}" for channel in channels)


def _shade(colour: str, index: int, count: int) -> str:
    """The colour of a rank's virtual stage: the first in full, later ones mixed with up to 45 % white."""
    white = 0.45 * index / max(1, count - 1)
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


def _draw_axis(svg: Element, y: int, scale: float) -> None:
    duration_s = _CHART / scale
    step_s = tick_step(duration_s, 10)
    for tick in range(int(duration_s / step_s) + 1):
        x = _LEFT + tick * step_s * scale
        SubElement(svg, "path", d=f"M{x:.1f} {y - 1}v5", stroke=_FAINT)
        _text(svg, seconds_text(tick * step_s), x, y + 17, anchor="middle", fill=_FAINT, size=11)


def _draw_legend(svg: Element, timelines: Sequence[Timeline], y: int) -> None:
    used = {span.action.kind for timeline in timelines for spans in timeline.ranks for span in spans}
    count = max(len({span.action.stage for span in spans}) for timeline in timelines for spans in timeline.ranks)
    x = float(_LEFT)
    for kind, (colour, meaning) in _KINDS.items():
        if kind not in used:
            continue
        for index in range(count):
            SubElement(svg, "rect", x=f"{x:.1f}", y=str(y), width="14", height="12", fill=_shade(colour, index, count))
            x += 14
        label = f"{kind} {meaning}"
        _text(svg, label, x + 5, y + 10)
        x += 5 + 6.6 * len(label) + 18
    SubElement(svg, "rect", x=f"{x:.1f}", y=str(y), width="14", height="12", fill=_IDLE)
    _text(svg, "idle (bubble)", x + 19, y + 10)
    if count > 1:
        _text(svg, "lighter: later virtual stage of the rank", _LEFT + _CHART, y + 10, anchor="end", fill=_FAINT)


def _text(
    svg: Element,
    text: str,
    x: float,
    y: float,
    *,
    anchor: str = "start",
    fill: str = _INK,
    size: int = 12,
    weight: str = "400",
) -> None:
    attributes = {"text-anchor": anchor, "font-size": str(size), "font-weight": weight}
    SubElement(svg, "text", attributes, x=f"{x:.1f}", y=str(y), fill=fill).text = text
