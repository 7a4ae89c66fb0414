"""Measured and predicted values at a few rates, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import SubElement, tostring

from triaxial.report.svg import FAINT, PALETTE, WIDTH, picture, write

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 60, 220, 50, 40, 360


@dataclass(frozen=True)
class Line:
    """Values at every rate."""

    name: str
    measured: Sequence[float]
    predicted: Sequence[float]


def lines_svg(title: str, rates: Sequence[str], lines: Sequence[Line]) -> str:
    """Draw what was measured as dots and what was predicted as lines, values on a logarithmic scale."""
    values = [value for line in lines for value in (*line.measured, *line.predicted)]
    low, high = math.log(min(values) / 1.1), math.log(max(values) * 1.1)
    floor = _HEIGHT - _BOTTOM
    across = (WIDTH - _LEFT - _RIGHT) / max(len(rates) - 1, 1)

    def height(value: float) -> float:
        return floor - (math.log(value) - low) / (high - low) * (floor - _TOP)

    svg = picture(f"{title} (dots measured, lines predicted)", _HEIGHT)
    for index, rate in enumerate(rates):
        write(svg, rate, _LEFT + index * across - 20, floor + 24, fill=FAINT)
    for tick in _ticks(math.exp(low), math.exp(high)):
        level = f"{height(tick):.1f}"
        SubElement(svg, "line", x1=str(_LEFT), x2=str(WIDTH - _RIGHT), y1=level, y2=level, stroke="#e5e7eb")
        write(svg, f"{tick:g}", 24, height(tick) + 4, fill=FAINT)
    for index, (line, colour) in enumerate(zip(lines, PALETTE)):
        points = " ".join(f"{_LEFT + i * across:.1f},{height(value):.1f}" for i, value in enumerate(line.predicted))
        SubElement(svg, "polyline", points=points, fill="none", stroke=colour)
        for i, value in enumerate(line.measured):
            SubElement(svg, "circle", cx=f"{_LEFT + i * across:.1f}", cy=f"{height(value):.1f}", r="4", fill=colour)
        SubElement(svg, "circle", cx=str(WIDTH - _RIGHT + 20), cy=str(_TOP + 20 * index), r="4", fill=colour)
        write(svg, line.name, WIDTH - _RIGHT + 32, _TOP + 20 * index + 4)
    return tostring(svg, encoding="unicode")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, between the bounds."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]
