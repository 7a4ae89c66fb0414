"""What the front sends to ranks and what they answer: length-prefixed frames of JSON and int32 arrays.

A frame is its length (4 bytes, little-endian) and its body. Nothing that is read here can execute anything.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triaxial.serve.request import Request, Sampling

_LENGTH = struct.Struct("<I")
_SIZES = struct.Struct("<qiiii")
_COLUMNS = 6
"""Numbers of an entry before its block table."""

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Entry:
    """Tokens of one sequence in a step."""

    slot: int
    """The sequence's row in the sampler's tables."""
    first: int
    """Position of the first of the tokens."""
    tokens: list[int]
    sample: bool
    """The last of them is the last that is known: choose the next one."""
    score: bool
    """Log-probabilities of the prompt's tokens are wanted: compute the logits of all tokens, not of the last alone."""
    base: int
    """Position of the first token in `blocks`."""
    blocks: list[int]


@dataclass(frozen=True)
class SamplerState:
    """What the sampler must know of a sequence that begins, or begins again."""

    slot: int
    sampling: Sampling
    seed: int
    prompt: int
    """Length of the prompt; the tokens after it were chosen before."""
    tokens: tuple[int, ...]
    """All tokens, if the sampling depends on them."""

    @staticmethod
    def of(slot: int, request: Request, seed: int, tokens: Sequence[int]) -> SamplerState:
        s = request.sampling
        looks_back = (
            s.prompt_logprobs is not None
            or s.repetition_penalty != 1
            or s.presence_penalty != 0
            or s.frequency_penalty != 0
        )
        return SamplerState(slot, s, seed, len(request.prompt), tuple(tokens) if looks_back else ())


@dataclass(frozen=True)
class Step:
    """One forward pass: entries in order, decoding ones first, and what the sampler learns before it."""

    number: int
    entries: tuple[Entry, ...]
    states: tuple[SamplerState, ...] = ()


@dataclass(frozen=True)
class StepArrays:
    """A step as a rank reads it; `n` sequences."""

    number: int
    slots: Ints  # [n]
    first: Ints  # [n]
    counts: Ints  # [n] tokens of each
    sample: NDArray[np.bool_]  # [n]
    score: NDArray[np.bool_]  # [n]
    base: Ints  # [n]
    tables: Ints  # [n, widest table], filled up with block 0
    tokens: Ints  # [sum of counts]
    states: list[SamplerState]


def encode_step(step: Step) -> bytes:
    n, width = len(step.entries), max(len(e.blocks) for e in step.entries)
    columns = np.zeros((n, _COLUMNS + width), np.int32)
    for row, e in zip(columns, step.entries, strict=True):
        row[:_COLUMNS] = e.slot, e.first, len(e.tokens), e.base, e.sample, e.score
        row[_COLUMNS : _COLUMNS + len(e.blocks)] = e.blocks
    tokens = np.array([token for e in step.entries for token in e.tokens], np.int32)
    states = json.dumps([asdict(state) for state in step.states]).encode() if step.states else b""
    return b"".join(
        (_SIZES.pack(step.number, n, width, len(tokens), len(states)), columns.tobytes(), tokens.tobytes(), states)
    )


def decode_step(body: bytes) -> StepArrays:
    number, n, width, num_tokens, states_bytes = _SIZES.unpack_from(body)
    at = _SIZES.size
    columns = np.frombuffer(body, np.int32, n * (_COLUMNS + width), at).reshape(n, _COLUMNS + width)
    at += columns.nbytes
    tokens = np.frombuffer(body, np.int32, num_tokens, at)
    at += tokens.nbytes
    states = [_state(raw) for raw in json.loads(body[at : at + states_bytes])] if states_bytes else []
    slots, first, counts, base, sample, score = np.ascontiguousarray(columns[:, :_COLUMNS].T)
    tables = np.ascontiguousarray(columns[:, _COLUMNS:])
    return StepArrays(
        number, slots, first, counts, sample.astype(bool), score.astype(bool), base, tables, tokens, states
    )


def _state(raw: dict[str, Any]) -> SamplerState:
    given = raw["sampling"]
    given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    given["stop_token_ids"] = tuple(given["stop_token_ids"])
    return SamplerState(raw["slot"], Sampling(**given), raw["seed"], raw["prompt"], tuple(raw["tokens"]))


def frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(frame(json.dumps(message).encode()))


def receive_frame(connection: socket.socket) -> bytes | None:
    """The next frame's body; None when the other side has closed."""
    head = _receive(connection, _LENGTH.size)
    return None if head is None else _receive(connection, _LENGTH.unpack(head)[0])


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts, left = [], size
    while left:
        part = connection.recv(left)
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
