"""A config.json means here what it means to transformers, and anything else is one clear sentence."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from triaxial import BadInput
from triaxial.model.spec import LinearRope, Llama3Rope, ModelSpec, load_model_spec, preset_names

PUBLISHED_PARAMETERS = {  # as the safetensors index of each model page counts them
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}

FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}

REQUIRED: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}

LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def preset_json(name: str) -> dict[str, Any]:
    text = (resources.files("triaxial.model") / "presets" / f"{name}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Write a config.json and read it back as a spec."""

    def read_config(config: Any) -> ModelSpec:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return load_model_spec(path)

    return read_config


def transformers_config(config: dict[str, Any]) -> Any:
    config = copy.deepcopy(config)  # transformers writes into the rope dictionary it is given
    return FAMILIES[config["architectures"][0]](**config)


def built(config: Any) -> Any:
    """The model that transformers builds, on no device."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


# ---- presets


def test_presets_are_the_promised_ones() -> None:
    assert {*preset_names()} == {*PUBLISHED_PARAMETERS, "gpt3-175b", "tiny-byte"}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_names_its_source(name: str) -> None:
    assert load_model_spec(name).name == name
    assert preset_json(name)["source"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_in_the_guide(name: str) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{re.escape(name)}` \| {load_model_spec(name).parameters:,} \|", guide, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_are_the_published_number(name: str) -> None:
    assert load_model_spec(name).parameters == PUBLISHED_PARAMETERS[name]


def test_gpt3_parameters_follow_the_published_formula() -> None:
    """12 L h^2 (1 + 13 / 12h + (V + s) / 12 L h), arXiv 2104.04473, equation 2; it leaves out the final norm's 2 h."""
    spec = load_model_spec("gpt3-175b")
    layers, h, vocab, s = spec.num_layers, spec.hidden, spec.vocab, spec.max_positions
    assert spec.parameters == 12 * layers * h * h + 13 * layers * h + (vocab + s) * h + 2 * h
    assert spec.parameters == pytest.approx(175e9, rel=0.003)


def test_tiny_byte_is_a_few_million_parameters_over_bytes() -> None:
    spec = load_model_spec("tiny-byte")
    assert spec.vocab == 256
    assert 3e6 < spec.parameters < 5e6


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "gpt3-175b"])
def test_preset_means_the_same_to_transformers(name: str) -> None:
    """Sizes field by field, and the parameters of the model that transformers builds."""
    theirs, spec = transformers_config(preset_json(name)), load_model_spec(name)
    assert spec.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.norm_eps == theirs.rms_norm_eps
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert spec.sliding_window == getattr(theirs, "sliding_window", None)
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.parameters == built(theirs).num_parameters()


def test_values_of_one_preset_a_family() -> None:
    assert load_model_spec("llama-3.2-1b") == ModelSpec(
        name="llama-3.2-1b",
        family="llama",
        num_layers=16,
        hidden=2048,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        ffn=8192,
        vocab=128_256,
        max_positions=131_072,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=Llama3Rope(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192),
        tied_embeddings=True,
    )
    mistral, qwen2, qwen3 = (load_model_spec(name) for name in ("mistral-7b", "qwen2.5-72b", "qwen3-32b"))
    assert (mistral.sliding_window, mistral.first_windowed_layer, mistral.norm_eps) == (4096, 0, 1e-5)
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.norm_eps, qwen2.sliding_window) == (True, False, 1e-5, None)
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.hidden, qwen3.qkv_bias) == (True, 128, 5120, False)
    gpt3 = load_model_spec("gpt3-175b")
    assert (gpt3.gated_mlp, gpt3.learned_positions, gpt3.layer_norm, gpt3.mlp_bias) == (False, True, True, True)


# ---- transformers' defaults, whatever a config leaves out


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 24},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"sliding_window": None},
        {"sliding_window": 64, "use_sliding_window": True},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 30},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 27},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}, "rope_theta": 5e5},
        {"rope_parameters": {**LLAMA3, "rope_theta": 3e5}},
    ],
)  # fmt: skip
def test_reads_what_transformers_reads(architecture: str, given: dict[str, Any], read: Any) -> None:
    config = {"architectures": [architecture], **REQUIRED, **given}
    theirs, spec = transformers_config(config), read(config)
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.norm_eps == theirs.rms_norm_eps
    assert spec.init_std == theirs.initializer_range
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    assert spec.rope_theta == rope["rope_theta"]
    assert (spec.rope_scaling.kind if spec.rope_scaling else "default") == rope["rope_type"]
    if isinstance(spec.rope_scaling, LinearRope | Llama3Rope):
        assert spec.rope_scaling.factor == rope["factor"]
    if isinstance(spec.rope_scaling, Llama3Rope):
        assert spec.rope_scaling.original_max_positions == rope["original_max_position_embeddings"]
    model = built(theirs)
    assert spec.parameters == model.num_parameters()
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.head_dim == spec.head_dim
        assert (attention.q_proj.bias is not None) == spec.qkv_bias
        assert (attention.o_proj.bias is not None) == spec.out_bias
        assert (mlp.down_proj.bias is not None) == spec.mlp_bias
        windowed = spec.sliding_window is not None and index >= spec.first_windowed_layer
        assert _window(model, attention) == (spec.sliding_window if windowed else None)


def _window(model: Any, attention: Any) -> int | None:
    if model.config.model_type == "mistral":
        window: int | None = model.config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)


def test_null_kv_heads_are_one_for_each_query_head(read: Any) -> None:
    for architecture in FAMILIES:
        assert read({"architectures": [architecture], **REQUIRED, "num_key_value_heads": None}).num_kv_heads == 32


# ---- bad input


@pytest.mark.parametrize("field", ["architectures", *REQUIRED])
def test_a_missing_field_is_named(field: str, read: Any) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **REQUIRED}
    del config[field]
    with pytest.raises(BadInput, match=rf"config\.json: {field} is missing$"):
        read(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; known: GPT3Shape, L"),
        ({"architectures": []}, "architectures: "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"hidden_size": 0}, "hidden_size: Input should be greater than 0"),
        ({"hidden_size": True}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": "256"}, "hidden_size: Input should be a valid integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: Input should be a finite number"),
        ({"num_key_value_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
        ({"hidden_size": 100}, "hidden_size=100 must be a multiple of num_attention_heads=32 when head_dim"),
        ({"head_dim": 5}, "head_dim=5 must be even for rotary positions"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported; known: default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling lacks factor"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope scaling lacks factor"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor: Input should be a valid number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "high_freq_factor=4.0 must exceed low_freq_factor=4.0"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters: parameters that differ by layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported, only 1"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(change: dict[str, Any], message: str, read: Any) -> None:
    with pytest.raises(BadInput) as caught:
        read({"architectures": ["LlamaForCausalLM"], **REQUIRED, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alternating_windows_are_refused(read: Any) -> None:
    types = ["full_attention", "sliding_attention"] * 15
    config = {"architectures": ["Qwen3ForCausalLM"], **REQUIRED, "use_sliding_window": True, "layer_types": types}
    with pytest.raises(BadInput, match="layer_types must be full_attention, then sliding_attention, 30 in all"):
        read(config)
    with pytest.raises(BadInput, match="layer_types must be"):
        read({**config, "layer_types": ["full_attention"]})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"9" * 10_000, b"[" * 100_000])
def test_a_file_that_is_no_config_is_bad_input(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.json: "):
        load_model_spec(tmp_path)


@pytest.mark.parametrize("name", ["llama", "", "../presets/llama-2-7b", "nul\0byte", "no/such/config.json"])
def test_an_unknown_model_lists_the_presets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"no model .*: give a config\.json, a model folder, or one of gpt3-175b"):
        load_model_spec(name)


def test_a_name_that_no_file_system_takes_is_bad_input() -> None:
    with pytest.raises(BadInput, match="cannot read model"):
        load_model_spec("x" * 10_000)


def test_a_model_folder_is_read_and_names_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset_json("qwen3-8b")))
    spec = load_model_spec(folder)
    assert spec == load_model_spec(folder / "config.json")
    assert spec == load_model_spec("Qwen3-8B").model_copy(update={"name": "My-Model"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [*REQUIRED, "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
          "rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "hidden_act",
          "partial_rotary_factor", "attention_bias", "mlp_bias"]  # fmt: skip
ROPES = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from([*LLAMA3.values(), "linear", -1, 0.5]) | JSON for key in [*LLAMA3, "rope_theta"]}
)
anything = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)


def spec_or_bad_input(config: Any, path: Path) -> None:
    path.write_text(json.dumps(config))
    with contextlib.suppress(BadInput):
        assert load_model_spec(path).parameters > 0


@anything
@given(config=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_json_is_a_spec_or_bad_input(config: Any, tmp_path: Path) -> None:
    spec_or_bad_input(config, tmp_path / "config.json")


@anything
@given(
    name=st.sampled_from(preset_names()),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON | ROPES | st.integers(1, 64), max_size=3),
    removed=st.sets(st.sampled_from(FIELDS), max_size=2),
)
def test_any_change_to_a_config_is_a_spec_or_bad_input(
    name: str, changes: dict[str, Any], removed: set[str], tmp_path: Path
) -> None:
    config = {key: value for key, value in {**preset_json(name), **changes}.items() if key not in removed}
    spec_or_bad_input(config, tmp_path / "config.json")


@given(st.text())
def test_any_name_is_a_preset_or_bad_input(name: str) -> None:
    if name in preset_names():
        return
    with pytest.raises(BadInput):
        load_model_spec(name)


def test_specs_are_immutable() -> None:
    with pytest.raises(ValidationError):
        load_model_spec("tiny-byte").hidden = 1  # type: ignore[misc]
