"""`EngineSettings`: everything that one replica is told, checked before a process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from triaxial import BadInput
from triaxial.model.spec import ModelSpec, describe, load_model_spec
from triaxial.plan.layout import Layout, check_layout, parse_layout

BLOCK_TOKENS = 16
"""Tokens of one sequence that a block of the KV cache holds."""

Precision = Literal["fp32", "bf16", "fp16"]
BYTES_PER_ELEMENT: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


class EngineSettings(BaseModel):
    """One replica. Times are in seconds, memory in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A Hugging Face folder; a preset or a config.json without weights gets random ones."""
    layout: str = "tp=1"
    """tp and pp; dp is replicas, which are started one by one."""
    precision: Precision = "bf16"
    seed: NonNegativeInt = 0
    """Of random weights, where the model has none."""
    kv_memory: PositiveInt | None = None
    """Bytes of KV cache on each rank; None takes half of what is free, and no more than could be used."""
    memory_share: float = Field(1.0, gt=0, le=1)
    """The part of the host's free memory that this replica may count on."""
    max_batch: PositiveInt = 64
    """Sequences that are decoded at the same time."""
    chunk_tokens: PositiveInt | None = None
    """Tokens in a step; None is 512 over pp, so that a prompt's chunks fill the pipeline."""
    max_model_len: PositiveInt | None = None
    """Tokens of a sequence, prompt included; None is what the model has positions for."""
    timeout_s: PositiveFloat = 120.0
    """After which a step that has not come back means that a rank hangs."""
    threads: PositiveInt = 1
    """Of every rank, on a CPU."""

    @property
    def parsed_layout(self) -> Layout:
        return parse_layout(self.layout)

    @property
    def step_tokens(self) -> int:
        """At least one sequence each, and room for a prompt besides."""
        return max(self.chunk_tokens or 512 // self.parsed_layout.pp, 1)

    def check(self) -> ModelSpec:
        """The model, if this layout can decode it.

        Raises:
            BadInput: what does not fit.
        """
        spec, layout = load_model_spec(self.model), self.parsed_layout
        if layout.dp > 1 or layout.cp > 1 or layout.ep > 1 or layout.vpp > 1 or layout.sp:
            raise BadInput(f"an engine is spread over tp and pp only, not {layout}: use tp=N,pp=M")
        check_layout(layout, spec, seq_len=spec.max_positions)
        if spec.experts is not None or spec.latent is not None or spec.layer_norm or not spec.gated_mlp:
            raise BadInput(f"{spec.name} can be planned but not run: the decoder has RMS norms and gated MLPs")
        if self.max_model_len is not None and self.max_model_len > spec.max_positions:
            raise BadInput(
                f"max_model_len={self.max_model_len} is more than the {spec.max_positions} positions of {spec.name}"
            )
        return spec

    def model_len(self, spec: ModelSpec) -> int:
        return self.max_model_len or spec.max_positions


def weights_folder(model: str) -> Path | None:
    """The folder whose safetensors the model's weights are, if it has any."""
    folder = Path(model)
    has = folder.is_dir() and any((folder / name).is_file() for name in _WEIGHT_FILES)
    return folder if has else None


_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def end_tokens(model: str) -> frozenset[int]:
    """Ids after which a text is over: `eos_token_id` of generation_config.json, else of config.json."""
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    for file in ("generation_config.json", "config.json" if path.is_dir() else path.name):
        try:
            given = json.loads((folder / file).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # neither file is required for it
        if given is not None:
            return frozenset(given if isinstance(given, list) else [given])
    return frozenset()


def make_settings(**given: Any) -> EngineSettings:
    """Check settings one by one.

    Raises:
        BadInput: the first that is wrong.
    """
    try:
        return EngineSettings(**given)
    except ValidationError as error:
        raise BadInput(f"engine settings: {describe(error)}") from None
