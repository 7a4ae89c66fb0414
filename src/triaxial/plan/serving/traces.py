"""Requests that were recorded: traces of arrivals, and files of lengths."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from triaxial import BadInput
from triaxial.plan.serving.traffic import MAX_TOKENS, Ints, Traffic

Row = TypeVar("Row")
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class _Lengths(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input_tokens: Tokens = Field(validation_alias=AliasChoices("input_tokens", "num_prefill_tokens"))
    output_tokens: Tokens = Field(validation_alias=AliasChoices("output_tokens", "num_decode_tokens"))


class _Arrival(_Lengths):
    arrival_s: FiniteFloat = Field(ge=0, validation_alias=AliasChoices("arrival_s", "arrived_at"))


def read_trace(path: Path) -> Traffic:
    """Requests of a CSV file with columns `arrival_s`, `input_tokens` and `output_tokens` (or, as Splitwise's traces
    have them, `arrived_at`, `num_prefill_tokens` and `num_decode_tokens`), sorted by arrival.

    Raises:
        BadInput: no such file, a column is missing, or a row holds something else; the sentence names the line.
    """
    rows = _read(path, csv.DictReader(_text(path).splitlines()), TypeAdapter(_Arrival), first_line=2)
    arrival = np.array([row.arrival_s for row in rows])
    order = np.argsort(arrival, kind="stable")
    inputs, outputs = _columns(rows)
    return Traffic(arrival[order] - arrival[order[0]], inputs[order], outputs[order])


def read_lengths(path: Path, count: int) -> tuple[Ints, Ints]:
    """Lengths of `count` requests from a JSONL file, from its beginning and round again: each line is an object with
    `input_tokens` and `output_tokens`.

    Raises:
        BadInput: no such file, or a line holds something else; the sentence names it.
    """
    lines = (_json(path, number, line) for number, line in enumerate(_text(path).splitlines(), start=1))
    inputs, outputs = _columns(_read(path, lines, TypeAdapter(_Lengths), first_line=1))
    return np.resize(inputs, count), np.resize(outputs, count)


def _columns(rows: Sequence[_Lengths]) -> tuple[Ints, Ints]:
    lengths = np.array([(row.input_tokens, row.output_tokens) for row in rows], dtype=np.int64)
    return lengths[:, 0], lengths[:, 1]


def _read(path: Path, lines: Iterable[Any], kind: TypeAdapter[Row], first_line: int) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=first_line):
        try:
            rows.append(kind.validate_python(line))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise BadInput(
                f"{path}, line {number}: {problem['loc'][0] if problem['loc'] else 'the line'}: {problem['msg']}"
            ) from None
    if not rows:
        raise BadInput(f"{path} holds no requests")
    return rows


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadInput(f"{path}, line {number}: not JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text file: give a CSV file of arrivals or a JSONL file of lengths") from None
