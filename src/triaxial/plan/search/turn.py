"""How far one circumstance must move until another choice is best."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

REACH = 3
"""Doublings and halvings to look at: a circumstance that must change more than eightfold is no close call."""


def turning_point(
    best: Callable[[float], T], stays: Callable[[T], bool], *, upward: bool, precision: float
) -> tuple[float, T] | None:
    """Double or halve until the best choice changes, then bisect.

    Args:
        best: the best choice at so many times of what is now.
        stays: whether that is today's.
        precision: of the factor that is found.

    Returns: the factor and the choice there; None if today's choice stays the best within `REACH`.
    """
    step = 2.0 if upward else 0.5
    near, far = 1.0, step
    found = best(far)
    for _ in range(REACH - 1):
        if not stays(found):
            break
        near, far = far, far * step
        found = best(far)
    if stays(found):
        return None
    while max(near / far, far / near) > precision:
        middle = (near * far) ** 0.5
        there = best(middle)
        if stays(there):
            near = middle
        else:
            far, found = middle, there
    return far, found
