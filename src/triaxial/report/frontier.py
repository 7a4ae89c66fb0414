"""The frontier of latency and throughput as a picture and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import SubElement, tostring

from rich.table import Table

from triaxial.plan.serving.search.frontier import Point
from triaxial.report.si import seconds_text, tick_step
from triaxial.report.svg import FAINT, PALETTE, WIDTH, picture, write

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 70, 150, 40, 60, 420
_ROOM = 1.05  # of the largest value, on each axis


def frontier_svg(points: Sequence[Point]) -> str:
    """Draw tokens/s per GPU over the mean latency of a request, one colour for each split of the GPUs.

    Args:
        points: at least one, shortest latency first.
    """
    most_s = max(point.latency_s for point in points) * _ROOM
    most_tokens = max(point.tokens_per_s_per_gpu for point in points) * _ROOM
    across, up = (WIDTH - _LEFT - _RIGHT) / most_s, (_HEIGHT - _TOP - _BOTTOM) / most_tokens
    floor = _HEIGHT - _BOTTOM
    svg = picture("Tokens/s per GPU over the latency of a request", _HEIGHT)
    for tick in range(int(most_s / tick_step(most_s, 8)) + 1):
        value = tick * tick_step(most_s, 8)
        write(svg, f"{value:g} s", _LEFT + value * across, floor + 20, fill=FAINT)
    for tick in range(int(most_tokens / tick_step(most_tokens, 6)) + 1):
        value = tick * tick_step(most_tokens, 6)
        level = f"{floor - value * up:.1f}"
        SubElement(svg, "line", x1=str(_LEFT), x2=str(WIDTH - _RIGHT), y1=level, y2=level, stroke="#e5e7eb")
        write(svg, f"{value:,g}", 24, floor - value * up + 4, fill=FAINT)
    places = [(_LEFT + point.latency_s * across, floor - point.tokens_per_s_per_gpu * up) for point in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    SubElement(svg, "polyline", points=line, fill="none", stroke="#9ca3af")
    layouts = list(dict.fromkeys(point.layout for point in points))
    colours = {layout: PALETTE[index % len(PALETTE)] for index, layout in enumerate(layouts)}
    for point, (x, y) in zip(points, places):
        dot = SubElement(svg, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="5", fill=colours[point.layout])
        SubElement(dot, "title").text = _said(point)
    for index, layout in enumerate(layouts):
        row = _TOP + 20 * index
        SubElement(svg, "circle", cx=str(WIDTH - _RIGHT + 16), cy=str(row), r="5", fill=colours[layout])
        write(svg, layout, WIDTH - _RIGHT + 28, row + 4)
    return tostring(svg, encoding="unicode")


def _said(point: Point) -> str:
    return (
        f"{point.layout}: {point.tokens_per_s_per_gpu:,.0f} tokens/s per GPU at {point.requests_per_s:.3g} requests/s a "
        f"replica, TTFT {seconds_text(point.ttft_s)}, TPOT {seconds_text(point.tpot_s)}"
    )


def frontier_table(points: Sequence[Point]) -> Table:
    """The same as a table."""
    table = Table(title="Frontier of latency and throughput (medians; per replica)", title_justify="left")
    table.add_column("layout")
    for heading in ("step", "requests/s", "latency", "TTFT", "TPOT", "tok/s/GPU"):
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            point.layout,
            f"{point.chunk_tokens}",
            f"{point.requests_per_s:.3g}",
            seconds_text(point.latency_s),
            seconds_text(point.ttft_s),
            seconds_text(point.tpot_s),
            f"{point.tokens_per_s_per_gpu:,.0f}",
        )
    return table
