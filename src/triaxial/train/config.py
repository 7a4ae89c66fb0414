"""`TrainConfig`: everything that a training run is told, from flags or a TOML file, checked before anything starts."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from triaxial import BadInput
from triaxial.model.spec import ModelSpec, describe, load_model_spec
from triaxial.parallel.program import check_runnable
from triaxial.plan.layout import Layout, check_layout, micro_batches, parse_layout
from triaxial.train.optimizer import Hyperparameters


class TrainConfig(BaseModel):
    """One training run. Times are in seconds, sizes in sequences and tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: Path
    out: Path
    layout: str = "tp=1"
    steps: PositiveInt = 100
    global_batch: PositiveInt = 8
    seq_len: PositiveInt = 512
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    seed: NonNegativeInt = 0
    lr: PositiveFloat = 3e-4
    warmup_steps: NonNegativeInt = 10
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: PositiveFloat = 1.0
    tokenizer: Path | None = None
    """A `tokenizer.json`; None reads bytes."""
    held_out: float = Field(0.01, ge=0, lt=1)
    """Part of the data, from its end, that evaluation uses and training never sees."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; None evaluates once, at the end."""
    stop_after: PositiveInt | None = None
    """Leave off after this many steps, as if interrupted: the learning-rate curve is still that of `steps`."""
    timeout: PositiveFloat = 600.0
    """Seconds after which a rank stops waiting for another."""
    port: NonNegativeInt = 0
    """Of the local rendezvous; 0 takes a free one."""

    @property
    def parsed_layout(self) -> Layout:
        return parse_layout(self.layout)

    @property
    def hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(
            lr=self.lr, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, clip_norm=self.clip_norm
        )


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        BadInput: not there, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path}: {error}") from None


def make_config(settings: dict[str, Any]) -> TrainConfig:
    """Check settings one by one and together.

    Raises:
        BadInput: an unknown or wrong setting, or a layout that cannot do this job.
    """
    known = TrainConfig.model_fields
    if unknown := settings.keys() - known:
        raise BadInput(f"training settings: {min(unknown)} is not one of {', '.join(known)}")
    try:
        config = TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise BadInput(f"training settings: {describe(error)}") from None
    check_job(config)
    return config


def check_job(config: TrainConfig) -> ModelSpec:
    """The model, if the layout can train it at these sizes.

    Raises:
        BadInput: the first thing that does not fit.
    """
    spec, layout = load_model_spec(config.model), config.parsed_layout
    check_layout(layout, spec, config.seq_len)
    check_runnable(layout, spec)
    micro_batches(layout, config.global_batch)
    if config.seq_len > spec.max_positions:
        raise BadInput(
            f"sequence length {config.seq_len} is more than the {spec.max_positions} positions of {spec.name}"
        )
    _check_free(config.out)
    return spec


def _check_free(out: Path) -> None:
    """Refuse a folder that holds something or cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not empty: choose another --out")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"cannot write to {existing}: choose another --out")
