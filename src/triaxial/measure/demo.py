"""The demo: one small model trained under three layouts, which must agree, and what it has learnt."""

from __future__ import annotations

import json
import statistics
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from triaxial.train.config import TrainConfig, make_config
from triaxial.train.launch import launch, train_here
from triaxial.train.sample import greedy
from triaxial.train.tokenizer import ByteTokenizer

MODEL = "tiny-byte"
LAYOUTS = ("tp=1,pp=1,dp=1,mb=8", "tp=2,pp=2,dp=1,mb=2", "tp=2,pp=1,dp=2,mb=4")
"""Micro-batches differ too: whole batch at once, four for the pipeline, one on each replica."""
PROMPT = "def "
SAMPLE_LENGTH = 160

_SETTINGS = {"model": MODEL, "steps": 100, "global_batch": 8, "seq_len": 256, "lr": 1e-3, "warmup_steps": 10, "seed": 1}


@dataclass(frozen=True)
class DemoRun:
    """What one layout did."""

    layout: str
    losses: list[float]
    tokens_per_s: float
    """Median over the steps."""
    peak_memory_bytes: int
    """Of the fullest rank's process."""
    bubble_fraction: float


@dataclass(frozen=True)
class Demo:
    runs: list[DemoRun]
    largest_difference: float
    """Between the losses of any two layouts at any step, relative to the loss."""
    sample: str
    """What the model trained in one process writes after `PROMPT`."""


def run_demo(out: Path, announce: Callable[[str], None]) -> Demo:
    """Train the demo's model on Python's own standard library under every layout of `LAYOUTS`.

    Args:
        out: a folder that does not exist yet or is empty; each layout's run goes into a folder of its own.
        announce: told the layout that starts.

    Raises:
        BadInput: `out` is not empty.
        NoAnswer: a rank failed.
    """
    sample = ""
    runs = []
    for layout in LAYOUTS:
        announce(layout)
        config = make_config(
            _SETTINGS | {"data": sysconfig.get_path("stdlib"), "layout": layout, "out": out / layout.replace(",", "-")}
        )
        if config.parsed_layout.world_size == 1:
            sample = _continue_prompt(config)
        else:
            launch(config)
        runs.append(_read_run(config))
    first, *others = (run.losses for run in runs)
    difference = max(abs(a - b) / a for losses in others for a, b in zip(first, losses, strict=True))
    return Demo(runs, difference, sample)


def _continue_prompt(config: TrainConfig) -> str:
    trainer, tokenizer = train_here(config), ByteTokenizer()
    ids = greedy(trainer.program, tokenizer.encode(PROMPT), SAMPLE_LENGTH, config.seq_len)
    return PROMPT + tokenizer.decode(ids)


def _read_run(config: TrainConfig) -> DemoRun:
    lines = (config.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for line in lines if "loss" in (record := json.loads(line))]
    return DemoRun(
        layout=config.layout,
        losses=[step["loss"] for step in steps],
        tokens_per_s=statistics.median(step["tokens_per_s"] for step in steps),
        peak_memory_bytes=max(step["peak_memory_bytes"] for step in steps),
        bubble_fraction=statistics.median(step["bubble_fraction"] for step in steps),
    )
