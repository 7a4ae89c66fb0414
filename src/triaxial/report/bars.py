"""Stacked bars as SVG: where the seconds, or the bytes, of several layouts go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from triaxial.report.si import tick_step
from triaxial.report.svg import FAINT, PALETTE, WIDTH, picture, write

_LEFT, _RIGHT, _ROW, _TOP = 24, 24, 46, 64


def stacked_bars(title: str, unit: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Draw one bar per row, its parts side by side on one scale; parts that are nowhere above zero are left out.

    Args:
        unit: of the values, such as `s` or `GiB`.
        rows: label and value of each part, topmost first. At least one.
    """
    parts = [part for part in rows[0][1] if any(values[part] > 0 for _, values in rows)]
    longest = max(sum(values[part] for part in parts) for _, values in rows) or 1.0
    scale = (WIDTH - _LEFT - _RIGHT) / longest
    height = _TOP + _ROW * len(rows) + 30
    svg = picture(title, height)
    _legend(svg, parts)
    for index, (label, values) in enumerate(rows):
        top = _TOP + index * _ROW
        total = sum(values[part] for part in parts)
        write(svg, f"{label}: {total:.4g} {unit}", _LEFT, top + 12)
        left = float(_LEFT)
        for part, colour in zip(parts, PALETTE):
            width = values[part] * scale
            box = {"x": f"{left:.1f}", "y": str(top + 17), "width": f"{width:.1f}", "height": "18", "fill": colour}
            tip = SubElement(SubElement(svg, "rect", box), "title")
            tip.text = f"{part}: {values[part]:.4g} {unit}"
            left += width
    _axis(svg, longest, scale, height - 12, unit)
    return tostring(svg, encoding="unicode")


def _legend(svg: Element, parts: Sequence[str]) -> None:
    left = _LEFT
    for part, colour in zip(parts, PALETTE):
        SubElement(svg, "rect", {"x": str(left), "y": "34", "width": "12", "height": "12", "fill": colour})
        write(svg, part, left + 17, 44)
        left += 34 + 7 * len(part)


def _axis(svg: Element, longest: float, scale: float, y: int, unit: str) -> None:
    step = tick_step(longest, 8)
    for tick in range(int(longest / step) + 1):
        write(svg, f"{tick * step:g} {unit}", round(_LEFT + tick * step * scale), y, fill=FAINT)
