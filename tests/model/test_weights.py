"""Every element of a model is on the ranks that should hold it, counted once, with values that no layout changes."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from triaxial import BadInput
from triaxial.model import weights
from triaxial.model.spec import ModelSpec
from triaxial.model.weights import LocalParameter, Piece, SafetensorsFolder, Slicer, fill, initial_values


def spec_of(**changes: Any) -> ModelSpec:
    base = {
        "name": "tiny",
        "family": "llama",
        "num_layers": 2,
        "hidden": 24,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 6,
        "ffn": 40,
        "vocab": 101,
        "max_positions": 64,
    }
    return ModelSpec(**(base | changes))


VARIANTS = {
    "untied": spec_of(),
    "tied": spec_of(tied_embeddings=True),
    "biases": spec_of(family="qwen2", qkv_bias=True),
    "all biases": spec_of(qkv_bias=True, out_bias=True, mlp_bias=True),
    "q and k norms, one kv head": spec_of(family="qwen3", qk_norm=True, num_kv_heads=1, head_dim=10),
    "no grouping": spec_of(num_kv_heads=8, vocab=127),
}


def parameters(spec: ModelSpec, index: int = 0, size: int = 1) -> list[LocalParameter]:
    """All that one tensor-parallel rank holds."""
    slicer = Slicer(spec, index, size)
    layers = [parameter for layer in range(spec.num_layers) for parameter in slicer.layer(layer)]
    return slicer.embedding() + layers + slicer.head()


def pieces(spec: ModelSpec, size: int) -> list[Piece]:
    """Of all ranks."""
    return [piece for index in range(size) for p in parameters(spec, index, size) for piece in p.pieces]


def coverage(spec: ModelSpec, size: int, *, counted_only: bool) -> dict[str, np.ndarray]:
    """How many ranks hold (and count) each element of each global tensor."""
    cover: dict[str, np.ndarray] = {}
    for piece in pieces(spec, size):
        whole = cover.setdefault(piece.name, np.zeros(piece.shape, dtype=int))
        assert whole.shape == piece.shape
        if piece.counted or not counted_only:
            whole[(slice(None),) * piece.dim + (slice(piece.start, piece.stop),)] += 1
    return cover


specs = st.builds(
    spec_of,
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    vocab=st.sampled_from([17, 101, 127]) | st.integers(1, 300),
    head_dim=st.sampled_from([2, 6, 16]),
    ffn=st.sampled_from([8, 40, 72]),
    num_layers=st.integers(1, 3),
    tied_embeddings=st.booleans(),
    qkv_bias=st.booleans(),
    out_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
)
sizes = st.sampled_from([1, 2, 4, 8])


@given(specs, sizes)
@settings(max_examples=60, deadline=None)
def test_every_element_is_held_and_counted_exactly_once(spec: ModelSpec, size: int) -> None:
    for name, ranks in coverage(spec, size, counted_only=False).items():
        assert ranks.min() >= 1, name
    counted = coverage(spec, size, counted_only=True)
    for name, ranks in counted.items():
        assert (ranks == 1).all(), name
    assert sum(ranks.size for ranks in counted.values()) == spec.parameters


@pytest.mark.parametrize("vocab", [17, 101, 127])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_odd_vocabulary_is_padded_alike_on_every_rank(vocab: int, size: int) -> None:
    spec = spec_of(vocab=vocab)
    slices = []
    for index in range(size):
        (embedding,) = Slicer(spec, index, size).embedding()
        (piece,) = embedding.pieces
        assert embedding.shape[0] % 8 == 0
        assert embedding.padding == embedding.shape[0] - (piece.stop - piece.start)
        slices.append((piece.start, piece.stop, embedding.shape))
    assert slices[0][0] == 0
    assert slices[-1][1] == vocab
    assert all(before[1] == after[0] for before, after in pairwise(slices))
    assert len({shape for _, _, shape in slices}) == 1


def test_a_small_vocabulary_leaves_the_last_ranks_nothing_but_padding() -> None:
    spec = spec_of(vocab=17)
    held = [Slicer(spec, index, 8).embedding()[0].pieces[0].local_shape[0] for index in range(8)]
    assert held == [8, 8, 1, 0, 0, 0, 0, 0]


def test_kv_heads_fewer_than_ranks_are_held_by_neighbours_and_counted_by_the_first() -> None:
    spec = spec_of(num_kv_heads=2)
    for index in range(8):
        qkv = next(p for p in Slicer(spec, index, 8).layer(0) if p.name == "qkv")
        q, k, v = qkv.pieces
        assert (q.start, q.stop) == (index * 6, index * 6 + 6)
        assert (k.start, k.stop) == (v.start, v.stop) == ((0, 6) if index < 4 else (6, 12))
        assert (q.counted, k.counted, v.counted) == (True, index in (0, 4), index in (0, 4))
        assert (q.summed_over, k.summed_over, v.summed_over) == ("", "kv", "kv")


def test_fused_projections_are_cut_per_part() -> None:
    """Never contiguously: rank 1 of 2 has the second half of Q, of K and of V, and of gate and of up."""
    layer = {p.name: p for p in Slicer(spec_of(), 1, 2).layer(0)}
    assert [(p.start, p.stop) for p in layer["qkv"].pieces] == [(24, 48), (6, 12), (6, 12)]
    assert [(p.start, p.stop) for p in layer["gate_up"].pieces] == [(20, 40), (20, 40)]
    assert [p.name.split(".")[-2] for p in layer["qkv"].pieces + layer["gate_up"].pieces] == [
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_initial_values_are_slices_of_one_global_tensor_bitwise(name: str, size: int) -> None:
    spec = VARIANTS[name]
    source = initial_values(spec, 3)
    whole = {piece.name: source(piece) for piece in pieces(spec, 1)}
    for piece in pieces(spec, size):
        expected = whole[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
        assert torch.equal(source(piece), expected), piece.name


@given(rows=st.integers(1, 40), block=st.integers(1, 16), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_the_same_wherever_a_slice_begins(rows: int, block: int, data: st.DataObject) -> None:
    """Slices that begin, end or lie within any of the runs of rows that share a generator."""
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_INIT_ROWS", block)
        source = initial_values(spec_of(), 0)
        whole = source(Piece("w", (rows, 5), "normal", 0, 0, rows))
        assert torch.equal(source(Piece("w", (rows, 5), "normal", 0, start, stop)), whole[start:stop])
        assert torch.equal(source(Piece("w", (rows, 5), "normal", 1, 1, 4)), whole[:, 1:4])


def test_rows_beyond_a_block_have_a_generator_of_their_own() -> None:
    source = initial_values(spec_of(), 0)
    long = source(Piece("w", (1030, 4), "normal", 0, 0, 1030))
    assert torch.equal(long[:1024], source(Piece("w", (1024, 4), "normal", 0, 0, 1024)))
    assert torch.equal(long[1020:1028], source(Piece("w", (1030, 4), "normal", 0, 1020, 1028)))
    assert not torch.equal(long[1024:], long[:6])


def test_initial_values_have_the_spread_of_the_model_and_depend_on_name_and_seed() -> None:
    spec = spec_of(init_std=0.5, num_layers=8)
    big = (1500, 64)

    def draw(seed: int = 0, name: str = "a", init: weights.Init = "normal") -> Tensor:
        return initial_values(spec, seed)(Piece(name, big, init, 0, 0, big[0]))

    assert draw().std().item() == pytest.approx(0.5, rel=0.02)
    assert draw().mean().item() == pytest.approx(0, abs=0.01)
    assert draw(init="normal_residual").std().item() == pytest.approx(0.5 / 4, rel=0.02)  # sqrt(2 * 8 layers)
    assert not torch.equal(draw(), draw(seed=1))
    assert not torch.equal(draw(), draw(name="b"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_padding_rows_are_zero_and_the_rest_is_in_place(size: int) -> None:
    spec = spec_of(vocab=17, qkv_bias=True)
    source = initial_values(spec, 0)
    for index in range(size):
        for parameter in parameters(spec, index, size):
            tensor = torch.full(parameter.shape, torch.nan)
            fill(parameter, tensor, source)
            held = parameter.shape[0] - parameter.padding
            assert torch.equal(tensor[:held], torch.cat([source(piece) for piece in parameter.pieces]))
            assert not tensor[held:].any()
            assert parameter.numel == math.prod(parameter.shape) == tensor.numel()


def test_matrices_decay_and_vectors_do_not() -> None:
    decays = {p.name: p.decays for p in parameters(VARIANTS["all biases"])}
    assert {name for name, decay in decays.items() if decay} == {
        "embedding", "qkv", "out", "gate_up", "down", "head",
    }  # fmt: skip


# Safetensors.

SPEC = spec_of(num_layers=1)


def global_tensors() -> dict[str, Tensor]:
    return {
        piece.name: torch.randn(piece.shape, generator=torch.Generator().manual_seed(i))
        for i, piece in enumerate(pieces(SPEC, 1))
    }


def read_all(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    for piece in pieces(SPEC, 2):
        source(piece)


def test_slices_of_safetensors_are_those_of_the_whole_tensors(tmp_path: Path) -> None:
    tensors = global_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    for piece in pieces(SPEC, 4):
        expected = tensors[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start)
        assert torch.equal(source(piece), expected), piece.name


def one_sentence(error: pytest.ExceptionInfo[BadInput]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = global_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput) as error:
        read_all(tmp_path)
    assert f"{tmp_path / 'model.safetensors'}: cannot read model.layers.0.mlp.up_proj.weight" in one_sentence(error)


def test_a_wrong_shape_is_named_with_the_right_one(tmp_path: Path) -> None:
    save_file(global_tensors() | {"model.norm.weight": torch.ones(23)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.norm\.weight is \[23\], not \[24\]") as error:
        read_all(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_truncated_file_is_bad_input(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(global_tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(BadInput, match=r"model\.safetensors: cannot read model\.embed_tokens\.weight") as error:
        read_all(tmp_path)
    one_sentence(error)


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_bad_input(tmp_path: Path) -> None:
    names = list(global_tensors())
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="model-00001-of-00001") as error:
        read_all(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "not json"])
def test_an_index_that_is_none_is_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json") as error:
        read_all(tmp_path)
    one_sentence(error)


def test_a_tensor_that_the_index_does_not_name_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(BadInput, match=r"model\.embed_tokens\.weight") as error:
        read_all(tmp_path)
    one_sentence(error)


def test_a_folder_without_weights_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no model\.safetensors"):
        SafetensorsFolder(tmp_path)
