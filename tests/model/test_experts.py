"""Mixtures of experts are read and counted as their makers count them, and refused by the decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triaxial import BadInput
from triaxial.model.spec import load_model_spec, planned_preset_names
from triaxial.model.weights import Slicer


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46.7e9, 12.9e9),  # arXiv 2401.04088, section 1: 47B and 13B
        ("qwen3-30b-a3b", 30.5e9, 3.3e9),  # huggingface.co/Qwen/Qwen3-30B-A3B
        ("qwen3-235b-a22b", 235e9, 22e9),  # huggingface.co/Qwen/Qwen3-235B-A22B
        ("deepseek-v3", 671e9, 37e9),  # arXiv 2412.19437, abstract
    ],
)
def test_parameters_are_the_published_ones(name: str, total: float, active: float) -> None:
    spec = load_model_spec(name)
    assert spec.parameters == pytest.approx(total, rel=0.005)
    embedding = spec.vocab * spec.hidden  # published counts of active parameters include the look-up
    assert spec.matmul_parameters + embedding == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("name", planned_preset_names())
def test_the_decoder_refuses_them(name: str) -> None:
    with pytest.raises(BadInput, match="planned, not run"):
        Slicer(load_model_spec(name))


def test_deepseeks_first_layers_are_dense() -> None:
    spec = load_model_spec("deepseek-v3")
    assert spec.num_dense_layers == 3
    assert spec.experts is not None
    assert (spec.experts.count, spec.experts.per_token, spec.experts.shared) == (256, 8, 1)


def test_a_mixture_without_its_sizes_is_bad_input(tmp_path: Path) -> None:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="number of experts"):
        load_model_spec(path)
