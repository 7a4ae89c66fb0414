"""What the charts share: an empty picture, and text in it."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement

PALETTE = ("#3b6ea5", "#d98032", "#7a5aa6", "#3f9b5f", "#c4525c", "#8a8f98", "#b59a2d", "#4aa3b5")
WIDTH = 960
FAINT = "#6b7280"


def picture(title: str, height: int) -> Element:
    """A picture `WIDTH` wide with its title in the left upper corner."""
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "font-family": "system-ui, sans-serif",
            "font-size": "12",
            "role": "img",
            "aria-label": title,
        },
    )
    write(svg, title, 24, 20, size="15", weight="600")
    return svg


def write(
    svg: Element, text: str, x: float, y: float, size: str = "12", weight: str = "400", fill: str = "#1f2937"
) -> None:
    """Put text with its lower left corner at (x, y)."""
    attributes = {"x": f"{x:g}", "y": f"{y:g}", "font-size": size, "font-weight": weight, "fill": fill}
    SubElement(svg, "text", attributes).text = text
