"""The compiled library, where there is one for this processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Of the functions of each type."""
Addresses = ctypes.Array[ctypes.c_void_p]


@cache
def library() -> ctypes.CDLL | None:
    files = [Path(__file__).with_name(f"avx512{suffix}") for suffix in EXTENSION_SUFFIXES]
    built = [file for file in files if file.exists()]
    if not built or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return ctypes.CDLL(str(built[0]))


def declared(function: Any, *types: type) -> Callable[..., Any]:
    """A function of the library that takes these and returns a number, or nothing that anyone looks at."""
    function.argtypes, function.restype = types, NUMBER
    return function  # type: ignore[no-any-return]


def addresses(of: Sequence[int]) -> Addresses:
    return (POINTER * len(of))(*of)
