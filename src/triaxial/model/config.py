"""`HfConfig`: what a Hugging Face `config.json` says, with the defaults that transformers 5 gives each family."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from triaxial import BadInput

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt3", "mixtral", "qwen3_moe", "deepseek_v3"]

FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT3Shape": "gpt3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
PLANNED_ONLY: frozenset[Family] = frozenset({"mixtral", "qwen3_moe", "deepseek_v3"})
"""Families that are priced but that no decoder here computes."""

PositiveNumber = Annotated[FiniteFloat, Field(gt=0)]


class Frozen(BaseModel):
    """A value: immutable, no field but the declared ones, no coercion (`true` is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LinearRope(Frozen):
    """Position interpolation: angles are divided by `factor` (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveNumber


class Llama3Rope(Frozen):
    """Llama 3.1's scaling by wavelength, in positions: those above original_max_positions / low_freq_factor are
    divided by `factor`, those below original_max_positions / high_freq_factor kept, the rest blended (Meta's
    llama-models, `apply_scaling`)."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveNumber
    low_freq_factor: PositiveNumber
    high_freq_factor: PositiveNumber
    original_max_positions: PositiveInt

    @model_validator(mode="after")
    def _bands_are_ordered(self) -> Llama3Rope:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )
        return self


RopeScaling = Annotated[LinearRope | Llama3Rope, Field(discriminator="kind")]


class _HfRope(BaseModel):
    """The value of `rope_parameters` (transformers 5) or `rope_scaling` (before)."""

    model_config = ConfigDict(extra="ignore", strict=True)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: PositiveNumber | None = None
    factor: PositiveNumber | None = None
    low_freq_factor: PositiveNumber | None = None
    high_freq_factor: PositiveNumber | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: PositiveNumber | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_for_all_layers(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and any(isinstance(value, dict) for value in raw.values()):
            raise ValueError("parameters that differ by layer are not supported")
        return raw

    def given(self, *names: str) -> dict[str, Any]:
        """The named fields, all of which the kind of scaling needs."""
        values = {name: getattr(self, name) for name in names}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise BadInput(f"rope scaling lacks {', '.join(missing)}")
        return values


class HfConfig(BaseModel):
    """The fields that change what is computed; others are ignored.

    A key that is absent means what it means to transformers 5, whose default depends on the family. The sizes that
    every published config states are required, so that a stray JSON file is not read as a 7B model.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    architectures: list[str] = Field(min_length=1)
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveNumber = 1e-6
    hidden_act: str = "silu"
    rope_theta: PositiveNumber | None = None
    rope_scaling: _HfRope | None = None
    rope_parameters: _HfRope | None = None
    partial_rotary_factor: PositiveNumber | None = None
    original_max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: PositiveInt | None = 4096
    use_sliding_window: bool = False
    max_window_layers: NonNegativeInt = 28
    layer_types: list[str] | None = None
    initializer_range: PositiveNumber = 0.02
    num_local_experts: PositiveInt | None = None
    num_experts: PositiveInt | None = None
    n_routed_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    n_shared_experts: NonNegativeInt | None = None
    first_k_dense_replace: NonNegativeInt = 0
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt | None = None
    qk_nope_head_dim: PositiveInt | None = None
    qk_rope_head_dim: PositiveInt | None = None
    v_head_dim: PositiveInt | None = None

    def family(self) -> Family:
        """Raises BadInput for an architecture, or an activation, that is neither computed nor planned here."""
        family = FAMILY_OF_ARCHITECTURE.get(self.architectures[0])
        if family is None:
            names = sorted(
                FAMILY_OF_ARCHITECTURE, key=lambda name: (FAMILY_OF_ARCHITECTURE[name] in PLANNED_ONLY, name)
            )
            raise BadInput(f"architecture {self.architectures[0]!r} is not supported; known: {', '.join(names)}")
        if family != "gpt3" and self.hidden_act != "silu":
            raise BadInput(f"hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        return family

    def kv_heads(self) -> int:
        """Key/value heads; an explicit null is one for each query head."""
        if "num_key_value_heads" in self.model_fields_set:
            return self.num_key_value_heads or self.num_attention_heads
        return {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(self.family(), self.num_attention_heads)

    def width_of_head(self) -> int:
        """Elements of one head. Raises BadInput when it is not given and does not follow from the hidden size."""
        if self.head_dim:
            return self.head_dim
        if self.family() in ("qwen3", "qwen3_moe"):
            return 128
        if self.hidden_size % self.num_attention_heads:
            raise BadInput(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                f"{self.num_attention_heads} when head_dim is not given"
            )
        return self.hidden_size // self.num_attention_heads

    def window(self) -> tuple[int | None, int]:
        """Keys a query sees and the first layer so limited; (None, 0) when every layer attends to everything.

        Mistral windows every layer; Qwen only with `use_sliding_window`, from `max_window_layers` on or by
        `layer_types`; the other families ignore the field, as transformers does.

        Raises:
            BadInput: `layer_types` is not full-attention layers followed by windowed ones.
        """
        if self.family() == "mistral":
            return self.sliding_window, 0
        if self.family() not in ("qwen2", "qwen3") or not self.use_sliding_window or self.sliding_window is None:
            return None, 0
        layers, first = self.num_hidden_layers, self.max_window_layers
        if self.layer_types is not None:
            first = self.layer_types.count("full_attention")
            windowed = len(self.layer_types) - first
            expected = ["full_attention"] * first + ["sliding_attention"] * windowed
            if len(expected) != layers or self.layer_types != expected:
                raise BadInput(f"layer_types must be full_attention, then sliding_attention, {layers} in all")
        return (self.sliding_window, first) if first < layers else (None, 0)

    def experts(self) -> dict[str, int] | None:
        """Fields of `Experts`; None without experts.

        Raises:
            BadInput: a family that has experts, without their sizes.
        """
        if self.family() not in PLANNED_ONLY:
            return None
        count = self.num_local_experts or self.num_experts or self.n_routed_experts
        width = self.moe_intermediate_size or self.intermediate_size
        if count is None or self.num_experts_per_tok is None:
            raise BadInput("the number of experts, or num_experts_per_tok, is missing")
        shared, dense = self.n_shared_experts or 0, self.first_k_dense_replace
        return {
            "count": count,
            "per_token": self.num_experts_per_tok,
            "ffn": width,
            "shared": shared,
            "first_dense_layers": dense,
        }

    def latent(self) -> dict[str, int | None] | None:
        """Fields of `LatentAttention`; None without it."""
        if self.family() != "deepseek_v3" or self.kv_lora_rank is None:
            return None
        return {
            "query_rank": self.q_lora_rank,
            "kv_rank": self.kv_lora_rank,
            "nope_dim": self.qk_nope_head_dim,
            "rope_dim": self.qk_rope_head_dim,
            "value_dim": self.v_head_dim,
        }

    def rope(self) -> tuple[float, LinearRope | Llama3Rope | None]:
        """Base of the rotary frequencies and their scaling.

        Raises:
            BadInput: a scaling, or a part of the head, that no decoder here computes.
        """
        given = (rope for rope in (self.rope_scaling, self.rope_parameters) if rope and rope.model_fields_set)
        rope = next(given, _HfRope())
        if (rope.partial_rotary_factor or self.partial_rotary_factor or 1) != 1:
            raise BadInput("partial_rotary_factor is not supported, only 1")
        theta = rope.rope_theta or self.rope_theta or 10_000.0
        kind = rope.rope_type or rope.type or "default"
        if kind == "default" or (kind == "yarn" and self.family() in PLANNED_ONLY):
            return theta, None
        if kind == "linear":
            return theta, LinearRope(**rope.given("factor"))
        if kind == "llama3":
            original = self.original_max_position_embeddings or rope.original_max_position_embeddings
            return theta, Llama3Rope(
                **rope.given("factor", "low_freq_factor", "high_freq_factor"),
                original_max_positions=original or self.max_position_embeddings,
            )
        raise BadInput(f"rope scaling {kind!r} is not supported; known: default, linear, llama3")
