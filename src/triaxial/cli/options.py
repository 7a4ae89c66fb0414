"""Options that several planning commands share, and what they make of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

from triaxial import BadInput

Command = TypeVar("Command", bound=Callable[..., Any])


class WorkloadGroup(click.Group):
    """`COMMAND MODEL --options WORKLOAD --more-options`: click wants a group's options before its argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-"):
            split = next((i for i, arg in enumerate(args[1:], start=1) if arg in self.commands), len(args))
            args = [*args[1:split], args[0], *args[split:]]
        return super().parse_args(ctx, args)


def model_and_cluster(command: Command) -> Command:
    """MODEL and where it runs."""
    for decorate in reversed(
        (
            click.argument("model"),
            click.option("--cluster", required=True, help="NODESxGPUSxDEVICE (4x8xH100-SXM), a TOML file, or local."),
            click.option("--inter", help="Network between nodes: rate of one NIC (400Gb/s), or 8x400Gb/s."),
            click.option("--intra", help="Links inside a node: a kind (pcie4, nvlink4) or a rate (300GB/s)."),
            click.option("--gpu-price", type=float, help="Price of one GPU for an hour."),
        )
    ):
        command = decorate(command)
    return command


def training_work(command: Command) -> Command:
    """What one step must process."""
    for decorate in reversed(
        (
            click.option("--global-batch", type=int, required=True, help="Sequences per optimizer step."),
            click.option("--seq-len", type=int, required=True, help="Tokens per sequence."),
            click.option("--precision", default="bf16", show_default=True, help="bf16, fp16, fp8, fp4 or fp32."),
            click.option("--optimizer", default="adam", show_default=True, help="adam or sgd."),
        )
    ):
        command = decorate(command)
    return command


def as_json(command: Command) -> Command:
    return click.option("--json", "json_out", is_flag=True, help="Print one JSON document and nothing else.")(command)


def console() -> Console:
    """For tables: as wide as the terminal, or wide enough for them where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def parse_count(text: str) -> float:
    """Read a number of tokens: `15T`, `300B`, `2e12`.

    Raises:
        BadInput: not a positive number.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        number = float(match[1]) * 1000.0 ** ("KMBT".index(match[2].upper()) + 1 if match[2] else 0) if match else 0.0
    except ValueError:
        number = 0.0
    if number <= 0:
        raise BadInput(f"{text!r} is no number of tokens: write it like 15T, 300B or 2e12")
    return number
