"""Quantities with units: `"400Gb/s"`, `"80GiB"`, `"2.5us"` and `"989TFLOP/s"` as plain SI numbers.

Prefixes are decimal (k = 10^3) unless they carry an i (Ki = 2^10); a small b is a bit, a capital B a byte.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from triaxial import BadInput

Dimension = Literal["bytes", "bytes/s", "seconds", "FLOP/s"]

_EXAMPLE: dict[Dimension, str] = {
    "bytes": "80GiB",
    "bytes/s": "400Gb/s (bits) or 50GB/s (bytes)",
    "seconds": "2.5us",
    "FLOP/s": "989TFLOP/s",
}
_LARGE = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_SMALL = {"": 0, "m": -3, "u": -6, "n": -9}


def _prefixed(powers: dict[str, int], *units: str) -> dict[str, Decimal]:
    return {prefix + unit: Decimal(10) ** power for prefix, power in powers.items() for unit in units}


_BINARY = {f"{prefix}iB": Decimal(1024) ** power for power, prefix in enumerate("KMGT", start=1)}
_BYTES = _prefixed(_LARGE, "B") | _BINARY
_BITS = _prefixed(_LARGE, "b/s", "bit/s", "bps") | _prefixed(
    {"k": 3, "m": 6, "g": 9}, "bit"
)  # the last as tc(8) has it
_SCALE: dict[Dimension, dict[str, Decimal]] = {
    "bytes": _BYTES,
    "bytes/s": {f"{unit}/s": scale for unit, scale in _BYTES.items()}
    | {unit: scale / 8 for unit, scale in _BITS.items()},
    "seconds": _prefixed(_SMALL, "s"),
    "FLOP/s": _prefixed(_LARGE, "FLOP/s", "OP/s"),
}
_QUANTITY = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?)\s*(.*)", re.ASCII)


def parse_quantity(value: str | float, dimension: Dimension) -> float:
    """Read a quantity as a number of bytes, bytes/s, seconds or FLOP/s; a bare number already is one.

    Raises:
        BadInput: no number, an unknown unit, or a unit of another dimension.
    """
    if not isinstance(value, str):
        return float(value)
    match = _QUANTITY.fullmatch(value.strip())
    scale = {"": Decimal(1), **_SCALE[dimension]}.get(match[2]) if match else None
    if match is None or scale is None:
        raise BadInput(f"{value!r} is not a quantity in {dimension}: write it like {_EXAMPLE[dimension]}")
    return float(Decimal(match[1]) * scale)


def _reader(dimension: Dimension) -> BeforeValidator:
    def read(value: object) -> object:
        return parse_quantity(value, dimension) if isinstance(value, str) else value

    return BeforeValidator(read)


Bytes = Annotated[float, _reader("bytes"), Field(gt=0, allow_inf_nan=False)]
BytesPerSecond = Annotated[float, _reader("bytes/s"), Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, _reader("seconds"), Field(ge=0, allow_inf_nan=False)]
FlopPerSecond = Annotated[float, _reader("FLOP/s"), Field(gt=0, allow_inf_nan=False)]
