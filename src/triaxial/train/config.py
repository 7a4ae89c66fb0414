"""`TrainConfig`: everything that a training run is told, from flags or a TOML file, checked before anything starts."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from triaxial import BadInput
from triaxial.files import require_free
from triaxial.model.spec import ModelSpec, describe, load_model_spec
from triaxial.model.weights import SafetensorsFolder
from triaxial.parallel.program import check_runnable
from triaxial.plan.layout import Layout, check_layout, micro_batches, parse_layout
from triaxial.plan.pipeline.table import Schedule, read_schedule
from triaxial.plan.pipeline.validity import check_fit, check_schedule
from triaxial.train.optimizer import Hyperparameters

SETTINGS = "settings.json"
FIXED = {
    "global_batch", "seq_len", "precision", "seed", "lr", "warmup_steps", "weight_decay", "clip_norm", "held_out",
}  # fmt: skip
"""Settings that cannot change when a run is resumed. Model and data cannot either: checkpoints tell them by content."""


class TrainConfig(BaseModel):
    """One training run. Times are in seconds, sizes in sequences and tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: Path
    out: Path
    init: Path | None = None
    """A Hugging Face model folder whose weights training begins from; None begins from random values."""
    layout: str = "tp=1"
    schedule_table: Path | None = None
    """A pipeline schedule of one's own, as `triaxial schedule --json` writes it; None takes the layout's."""
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
    """A `tokenizer.json` or a folder that holds one; None takes that of `init`, or else reads bytes."""
    held_out: float = Field(0.01, ge=0, lt=1)
    """Part of the data, from its end, that evaluation uses and training never sees."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; None evaluates once, at the end."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; None saves once, at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints that stay; older ones are removed."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this stay for ever."""
    resume: bool = False
    """Go on with the run in `out`."""
    elastic: bool = False
    """Go on with the run in `out` or, if there is none, begin it; under torchrun, with a layout of as many ranks as
    there are."""
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
    def own_schedule(self) -> Schedule | None:
        return read_schedule(self.schedule_table) if self.schedule_table else None

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that determine what is computed, which a run keeps for ever."""
        return self.model_dump(mode="json", include=FIXED)

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


def continue_run(run: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in a folder, with what is `given` anew in their place.

    Raises:
        BadInput: no run there, or a setting that would change what it computes.
    """
    try:
        saved: dict[str, Any] = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{run} holds no run to resume: {SETTINGS}: {error.strerror}") from None
    except ValueError:
        raise BadInput(f"{run / SETTINGS} is not JSON") from None
    if "out" in given:
        raise BadInput(f"a resumed run goes on in its own folder, {run}: leave out --out")
    for name in sorted(FIXED & given.keys() & saved.keys()):
        if given[name] != saved[name]:
            raise BadInput(f"{name} of {run} is {saved[name]} and cannot become {given[name]}: leave it out")
    return saved | {"stop_after": None} | given | {"out": run, "resume": True}


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
    if config.init and config.tokenizer is None and (config.init / "tokenizer.json").is_file():
        config = config.model_copy(update={"tokenizer": config.init})
    if config.elastic:
        config = config.model_copy(update={"resume": True})
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
    num_micro_batches = micro_batches(layout, config.global_batch)
    if config.elastic and config.schedule_table:
        raise BadInput(f"{config.schedule_table} is for one layout: leave it out, or elastic")
    if schedule := config.own_schedule:
        check_schedule(schedule)
        check_fit(schedule, layout, num_micro_batches, spec.num_layers + 2)
    if config.seq_len > spec.max_positions:
        raise BadInput(
            f"sequence length {config.seq_len} is more than the {spec.max_positions} positions of {spec.name}"
        )
    if not config.resume:
        if config.init:
            SafetensorsFolder(config.init).check(spec)
        require_free(config.out, "another --out")
    return spec
