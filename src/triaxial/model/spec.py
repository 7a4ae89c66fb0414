"""`ModelSpec`: a transformer's architecture, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from triaxial import BadInput

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt3"]

_FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT3Shape": "gpt3",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinearRope(_Frozen):
    """Position interpolation: angles are divided by `factor` (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat


class Llama3Rope(_Frozen):
    """Llama 3.1's frequency-dependent scaling: low frequencies divided by `factor`, high ones kept."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_positions: PositiveInt


RopeScaling = Annotated[LinearRope | Llama3Rope, Field(discriminator="kind")]


class ModelSpec(_Frozen):
    """A decoder-only transformer. Sizes count elements; `ffn` is the width of the MLP's hidden layer."""

    name: str
    family: Family
    num_layers: PositiveInt
    hidden: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn: PositiveInt
    vocab: PositiveInt
    max_positions: PositiveInt
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gated_mlp: bool = True
    sliding_window: PositiveInt | None = None
    """Keys a query sees, itself included; None is full causal attention."""
    first_windowed_layer: int = 0
    """Layers before this one attend to everything (Qwen2's `max_window_layers`)."""
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads_agree(self) -> ModelSpec:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        return self

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, norms and biases included."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden
        mlp = (3 if self.gated_mlp else 2) * self.hidden * self.ffn
        biases = self.qkv_bias * (q + 2 * kv) + self.out_bias * self.hidden
        biases += self.mlp_bias * ((2 if self.gated_mlp else 1) * self.ffn + self.hidden)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + mlp + biases + norms

    @property
    def parameters(self) -> int:
        """All parameters; a tied output projection is counted once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply activations: every layer's matrices and the output projection."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = (3 if self.gated_mlp else 2) * self.hidden * self.ffn
        return self.num_layers * (self.hidden * (2 * q + 2 * kv) + mlp) + self.vocab * self.hidden

    def train_flop_per_token(self, seq_len: int) -> float:
        """Model FLOP of forward and backward for one token, no recompute, attention not halved for
        causality: 6 N + 12 L heads head_dim s (PaLM, arXiv 2204.02311, appendix B)."""
        return 6.0 * self.matmul_parameters + 12.0 * self.num_layers * self.num_heads * self.head_dim * seq_len


class _HfConfig(BaseModel):
    """The fields of a Hugging Face `config.json` that change what is computed; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    architectures: list[str] = Field(min_length=1)
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    initializer_range: PositiveFloat = 0.02

    def spec(self, name: str) -> ModelSpec:
        architecture = self.architectures[0]
        family = _FAMILY_OF_ARCHITECTURE.get(architecture)
        if family is None:
            known = ", ".join(sorted(_FAMILY_OF_ARCHITECTURE))
            raise BadInput(f"{name}: architecture {architecture!r} is not supported; known: {known}")
        if family != "gpt3" and self.hidden_act != "silu":
            raise BadInput(f"{name}: hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        windowed = family == "mistral" or (family in ("qwen2", "qwen3") and self.use_sliding_window)
        rope = self.rope_parameters or {}
        return ModelSpec(
            name=name,
            family=family,
            num_layers=self.num_hidden_layers,
            hidden=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            ffn=self.intermediate_size,
            vocab=self.vocab_size,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta or rope.get("rope_theta") or 10_000.0,
            rope_scaling=_rope_scaling(name, self.rope_scaling or rope, self.max_position_embeddings),
            tied_embeddings=self.tie_word_embeddings,
            qkv_bias=family == "qwen2" or self.attention_bias,
            out_bias=family in ("llama", "qwen3", "gpt3") and self.attention_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=family == "qwen3",
            gated_mlp=family != "gpt3",
            sliding_window=self.sliding_window if windowed else None,
            first_windowed_layer=self.max_window_layers if family in ("qwen2", "qwen3") else 0,
            init_std=self.initializer_range,
        )


def _rope_scaling(name: str, raw: dict[str, Any], max_positions: int) -> LinearRope | Llama3Rope | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(factor=raw["factor"])
    if kind == "llama3":
        return Llama3Rope(
            factor=raw["factor"],
            low_freq_factor=raw["low_freq_factor"],
            high_freq_factor=raw["high_freq_factor"],
            original_max_positions=raw.get("original_max_position_embeddings", max_positions),
        )
    raise BadInput(f"{name}: rope scaling {kind!r} is not supported; known: default, linear, llama3")


def preset_names() -> list[str]:
    """Names of the models that ship with the package."""
    presets = resources.files("triaxial.model") / "presets"
    return sorted(entry.name.removesuffix(".json") for entry in presets.iterdir() if entry.name.endswith(".json"))


def load_model_spec(model: str | Path) -> ModelSpec:
    """Read a model description.

    Args:
        model: a preset name, a `config.json`, or a Hugging Face model folder.

    Raises:
        BadInput: nothing there, not JSON, an unknown architecture, or a missing or wrong field.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    preset = resources.files("triaxial.model") / "presets" / f"{str(model).lower()}.json"
    if preset.is_file():
        return _parse(preset.read_text(encoding="utf-8"), str(model).lower())
    raise BadInput(
        f"no model {str(model)!r}: give a config.json, a model folder, or one of {', '.join(preset_names())}"
    )


def _parse(text: str, name: str) -> ModelSpec:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{name}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{name}: a model description is a JSON object, not {type(raw).__name__}")
    try:
        return _HfConfig.model_validate(raw).spec(name)
    except ValidationError as error:
        raise BadInput(f"{name}: {describe(error)}") from None
    except KeyError as error:
        raise BadInput(f"{name}: rope scaling lacks {error}") from None


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic validation error as a clause: where, and what is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
