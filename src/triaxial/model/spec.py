"""`ModelSpec`: a transformer's architecture, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, ValidationError, model_validator

from triaxial import BadInput
from triaxial.model.config import (
    PLANNED_ONLY,
    Family,
    Frozen,
    HfConfig,
    LinearRope,
    Llama3Rope,
    PositiveNumber,
    RopeScaling,
)
from triaxial.model.experts import Experts, LatentAttention

__all__ = [
    "Experts",
    "Family",
    "LatentAttention",
    "LinearRope",
    "Llama3Rope",
    "ModelSpec",
    "RopeScaling",
    "describe",
    "load_model_spec",
    "planned_preset_names",
    "preset_names",
    "read_description",
    "refuse_planned_only",
]


class ModelSpec(Frozen):
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
    norm_eps: PositiveNumber = 1e-6
    layer_norm: bool = False
    """LayerNorm with a bias in place of RMSNorm."""
    learned_positions: bool = False
    """A table of `max_positions` embeddings in place of rotary positions."""
    rope_theta: PositiveNumber = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gated_mlp: bool = True
    sliding_window: PositiveInt | None = None
    """Keys a query sees, itself included; None is full causal attention."""
    first_windowed_layer: NonNegativeInt = 0
    """Layers before this one attend to everything (Qwen's `max_window_layers`); 0 when nothing is windowed."""
    init_std: PositiveNumber = 0.02
    experts: Experts | None = None
    """Planned, not run."""
    latent: LatentAttention | None = None
    """Planned, not run."""

    @model_validator(mode="after")
    def _heads_agree(self) -> ModelSpec:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        return self

    @property
    def num_dense_layers(self) -> int:
        """Decoder layers without experts; they come first."""
        return min(self.experts.first_dense_layers, self.num_layers) if self.experts else self.num_layers

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's attention projections, biases apart."""
        if self.latent:
            return self.latent.parameters(self.hidden, self.num_heads)
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv)

    @property
    def attention_width(self) -> float:
        """Elements over all heads that a query is multiplied with per key: mean of the score's and the value's."""
        if self.latent:
            return self.num_heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim) / 2
        return float(self.num_heads * self.head_dim)

    def mlp_matrices(self, width: int) -> int:
        """Parameters of a feed-forward layer `width` wide, biases apart."""
        return (3 if self.gated_mlp else 2) * self.hidden * width

    @property
    def layer_parameters(self) -> int:
        """Parameters of one dense decoder layer, norms and biases included."""
        return self._outside_mlp + self.mlp_matrices(self.ffn)

    @property
    def expert_layer_parameters(self) -> int:
        """Parameters of one decoder layer with experts, router included; 0 in a dense model."""
        if self.experts is None:
            return 0
        every = (self.experts.count + self.experts.shared) * self.mlp_matrices(self.experts.ffn)
        return self._outside_mlp + every + self.hidden * self.experts.count

    @property
    def _outside_mlp(self) -> int:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = self.qkv_bias * (q + 2 * kv) + self.out_bias * self.hidden
        biases += self.mlp_bias * ((2 if self.gated_mlp else 1) * self.ffn + self.hidden)
        norms = 2 * self._norm_parameters + (2 * self.head_dim if self.qk_norm else 0)
        return self.attention_matrices + biases + norms

    @property
    def parameters(self) -> int:
        """All parameters; a tied output projection is counted once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        positions = self.max_positions * self.hidden if self.learned_positions else 0
        layers = self.num_dense_layers * self.layer_parameters
        layers += (self.num_layers - self.num_dense_layers) * self.expert_layer_parameters
        return embeddings + positions + layers + self._norm_parameters

    @property
    def _norm_parameters(self) -> int:
        return (2 if self.layer_norm else 1) * self.hidden

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply each token's activations: the layers' matrices (of the experts only those that
        the token visits) and the output projection."""
        dense = self.num_dense_layers * self.mlp_matrices(self.ffn)
        routed = 0
        if self.experts:
            visited = self.experts.per_token + self.experts.shared
            each = visited * self.mlp_matrices(self.experts.ffn) + self.hidden * self.experts.count
            routed = (self.num_layers - self.num_dense_layers) * each
        return self.num_layers * self.attention_matrices + dense + routed + self.vocab * self.hidden

    def train_flop_per_token(self, seq_len: int) -> float:
        """Model FLOP of forward and backward for one token, no recompute, attention not halved for
        causality: 6 N + 12 L heads head_dim s (PaLM, arXiv 2204.02311, appendix B)."""
        return 6.0 * self.matmul_parameters + 12.0 * self.num_layers * self.attention_width * seq_len


def preset_names() -> list[str]:
    """Names of the models that ship with the package."""
    presets = resources.files("triaxial.model") / "presets"
    return sorted(entry.name.removesuffix(".json") for entry in presets.iterdir() if entry.name.endswith(".json"))


def planned_preset_names() -> list[str]:
    """Names of further models that ship with the package, to plan for but not to run."""
    presets = resources.files("triaxial.model") / "presets" / "planned"
    return sorted(entry.name.removesuffix(".json") for entry in presets.iterdir() if entry.name.endswith(".json"))


def refuse_planned_only(spec: ModelSpec) -> None:
    """Raises BadInput for a model that can be priced but not run."""
    if spec.family in PLANNED_ONLY:
        raise BadInput(f"{spec.name}: mixtures of experts are planned, not run: use `triaxial plan` or `estimate`")


def load_model_spec(model: str | Path) -> ModelSpec:
    """Read a model description. The spec is named after the preset, or after the folder that holds the file.

    Args:
        model: a preset name, a `config.json`, or a Hugging Face model folder.

    Raises:
        BadInput: nothing there, not JSON, an unknown architecture, or a missing or wrong field.
    """
    return _parse(*_find(model))


def read_description(model: str | Path) -> dict[str, Any]:
    """The `config.json` that `model`, as in `load_model_spec`, stands for, in the form that transformers reads."""
    text, where, name = _find(model)
    family = _parse(text, where, name).family
    described: dict[str, Any] = {"model_type": family} | json.loads(text)
    return {key: value for key, value in described.items() if key != "source"}  # a preset's note on its origin


def _find(model: str | Path) -> tuple[bytes, str, str]:
    """Text of a description, where it was found and the model's name."""
    preset = str(model).lower()
    try:
        path = Path(model)
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            return path.read_bytes(), str(path), path.resolve().parent.name
    except OSError as error:
        raise BadInput(f"cannot read model {str(model)!r}: {error.strerror}") from None
    presets = resources.files("triaxial.model") / "presets"
    if preset in preset_names():
        return (presets / f"{preset}.json").read_bytes(), preset, preset
    if preset in planned_preset_names():
        return (presets / "planned" / f"{preset}.json").read_bytes(), preset, preset
    known = ", ".join([*preset_names(), *planned_preset_names()])
    raise BadInput(f"no model {str(model)!r}: give a config.json, a model folder, or one of {known}")


def _parse(text: bytes, where: str, name: str) -> ModelSpec:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of absurd length
        raise BadInput(f"{where}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{where}: a model description is a JSON object, not {type(raw).__name__}")
    try:
        return _spec_of(HfConfig.model_validate(raw), name)
    except ValidationError as error:
        raise BadInput(f"{where}: {describe(error)}") from None
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _spec_of(config: HfConfig, name: str) -> ModelSpec:
    family = config.family()
    window, first_windowed_layer = config.window()
    rope_theta, rope_scaling = config.rope()
    attention_bias = config.attention_bias and family in ("llama", "qwen3", "gpt3", "qwen3_moe")
    return ModelSpec(
        name=name,
        family=family,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.kv_heads(),
        head_dim=config.width_of_head(),
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        layer_norm=family == "gpt3",
        learned_positions=family == "gpt3",
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.mlp_bias and family in ("llama", "gpt3"),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        gated_mlp=family != "gpt3",
        sliding_window=window,
        first_windowed_layer=first_windowed_layer,
        init_std=config.initializer_range,
        experts=Experts(**experts) if (experts := config.experts()) else None,
        latent=LatentAttention.model_validate(latent) if (latent := config.latent()) else None,
    )


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic validation error as a clause: where, and what is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
