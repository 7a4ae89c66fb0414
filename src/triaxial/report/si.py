"""Numbers as people read them."""

from __future__ import annotations

import math


def seconds_text(seconds: float) -> str:
    """`2.5 ms`: three significant digits and the unit that keeps the number between 1 and 1000."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}" if abs(seconds) < 999.5 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0"


def tick_step(length: float, most: int) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that divides `length` into at most `most` steps."""
    power = 10.0 ** math.floor(math.log10(length / most))
    return next(step for factor in (1, 2, 5, 10) if (step := factor * power) * most >= length)
