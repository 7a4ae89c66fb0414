"""Boxes: rectangular parts of a global tensor, as (start, stop) of each dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, int], ...]


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Elements in the box."""
    return math.prod(shape_of(box))


def run_of_boxes(shape: Sequence[int], first: int, last: int) -> Iterator[Box]:
    """The boxes, in order, that elements [first, last) of a row-major tensor consist of.

    Of a matrix these are at most three: the end of a row, whole rows, the beginning of a row.
    """
    if len(shape) == 1:
        yield ((first, last),)
        return
    rest = shape[1:]
    row = math.prod(rest)
    (top, left), (bottom, right) = divmod(first, row), divmod(last, row)
    if top == bottom:
        yield from _in_row(top, run_of_boxes(rest, left, right))
        return
    if left:
        yield from _in_row(top, run_of_boxes(rest, left, row))
        top += 1
    if top < bottom:
        yield ((top, bottom), *((0, size) for size in rest))
    if right:
        yield from _in_row(bottom, run_of_boxes(rest, 0, right))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (((row, row + 1), *box) for box in boxes)


def shift(box: Box, dim: int, by: int) -> Box:
    """The box moved along one dimension."""
    return tuple((start + by, stop + by) if d == dim else (start, stop) for d, (start, stop) in enumerate(box))


def common(a: Box, b: Box) -> Box | None:
    """What two boxes share; None if that is nothing."""
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where the box lies in a tensor that holds `outer`."""
    return tuple(slice(start - o, stop - o) for (start, stop), (o, _) in zip(box, outer, strict=True))


def in_blocks(box: Box, elements: int) -> Iterator[Box]:
    """The box in blocks of rows, each of about so many elements at most."""
    (first, last), *rest = box
    rows = max(1, elements * (last - first) // volume(box))
    for start in range(first, last, rows):
        yield ((start, min(start + rows, last)), *rest)


def to_text(name: str, box: Box) -> str:
    """`name[0:32,16:32]`, the name under which a part of a tensor is stored."""
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in box)}]"


def from_text(text: str) -> tuple[str, Box]:
    """The inverse of `to_text`.

    Raises:
        ValueError: not such a name.
    """
    match = re.fullmatch(r"(.+)\[(\d+:\d+(?:,\d+:\d+)*)\]", text)
    if match is None:
        raise ValueError(f"{text!r} names no part of a tensor")
    spans = (span.split(":") for span in match[2].split(","))
    return match[1], tuple((int(start), int(stop)) for start, stop in spans)
