"""Models saved by transformers give the same logits here, whole and spread over tp=2, pp=2, and no rank reads more
of the files than it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.world import World
from triaxial.model import weights
from triaxial.model.decoder import Head
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.model.weights import SafetensorsFolder
from triaxial.parallel.program import Program, Shape, build_program
from triaxial.plan.layout import micro_batches, parse_layout
from triaxial.train.step import evaluate, make_micro_batches, own_samples

BATCH, SEQ, VOCAB = 4, 24, 101

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.12,
    "tie_word_embeddings": False,
}  # fmt: skip

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 10, "tie_word_embeddings": True}))


MODELS = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
LAYOUTS = ("tp=1,mb=4", "tp=2,pp=2,mb=2")


@dataclass(frozen=True)
class Reference:
    """A saved model and what transformers computes with it."""

    folder: Path
    spec: ModelSpec
    logits: np.ndarray
    loss: float


@dataclass(frozen=True)
class RankOutcome:
    loss: float
    logits: np.ndarray | None
    """[batch, seq, vocab/tp] where the head is."""
    read: dict[str, tuple[int, ...]]
    """Shape of what this rank read of each tensor."""


def tokens() -> tuple[np.ndarray, np.ndarray]:
    """Ids and next-token labels [batch, seq]."""
    drawn = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ + 1))
    return drawn[:, :-1].copy(), drawn[:, 1:].copy()


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    ids, labels = (torch.from_numpy(part) for part in tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of one and biases of zero would hide a mistake
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        logits = model(ids).logits
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB" if request.param == "llama" else "1GB")
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    return Reference(folder, load_model_spec(folder), logits.numpy(), loss)


class KeepingHead(Head):
    """A head that keeps its logits."""

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self(x)
        self.ops.kept.append(logits.clone())  # type: ignore[attr-defined]  # the loss overwrites them
        return self.ops.cross_entropy(logits, labels, self.first_row, self.spec.vocab)


def keep_logits(program: Program) -> list[Tensor]:
    """Logits of every micro-batch that the program is going to run; stays empty where the head is elsewhere."""
    kept: list[Tensor] = []
    for stage in program.stages.values():
        for place, placed in enumerate(stage.blocks):
            if isinstance(head := placed.block, Head):
                head.ops.kept = kept  # type: ignore[attr-defined]
                keeping = KeepingHead(head.parameters, head.ops, head.spec, head.first_row)
                stage.blocks[place] = replace(placed, block=keeping)  # type: ignore[index]
    return kept


class WatchedFile:
    """In place of `safe_open`: gives slices alone, and notes what was taken."""

    read: dict[str, tuple[int, ...]] = {}  # noqa: RUF012 - emptied before every run

    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)

    def __enter__(self) -> WatchedFile:
        self._open = self._file.__enter__()
        return self

    def get_slice(self, name: str) -> WatchedSlice:
        return WatchedSlice(name, self._open.get_slice(name))


@dataclass(frozen=True)
class WatchedSlice:
    name: str
    slice: Any

    def get_shape(self) -> list[int]:
        return self.slice.get_shape()  # type: ignore[no-any-return]

    def get_dtype(self) -> str:
        return self.slice.get_dtype()  # type: ignore[no-any-return]

    def __getitem__(self, where: Any) -> Tensor:
        values: Tensor = self.slice[where]
        assert self.name not in WatchedFile.read, f"{self.name} is read twice"
        WatchedFile.read[self.name] = tuple(values.shape)
        return values


def run_rank(rank: int, folder: Path, layout_text: str) -> RankOutcome:
    """Load this rank's part of the model and run the batch forwards."""
    layout, spec = parse_layout(layout_text), load_model_spec(folder)
    shape = Shape(layout.mb, SEQ)
    program = build_program(spec, layout, shape=shape, num_micro_batches=micro_batches(layout, BATCH), rank=rank)
    WatchedFile.read = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "safe_open", WatchedFile)
        program.load(SafetensorsFolder(folder))
    kept = keep_logits(program)
    ids, labels = tokens()
    mine = own_samples(np.arange(BATCH), program.mesh)
    loss = evaluate(program, make_micro_batches(ids[mine], labels[mine], program.mesh, torch.float32))
    logits = torch.cat([part.view(SEQ, layout.mb, -1).transpose(0, 1) for part in kept]).numpy() if kept else None
    return RankOutcome(loss, logits, WatchedFile.read)


def whole_logits(outcomes: list[RankOutcome]) -> np.ndarray:
    """The tensor-parallel ranks' parts side by side, without the padding."""
    return np.concatenate([o.logits for o in outcomes if o.logits is not None], axis=-1)[..., :VOCAB]


@pytest.fixture(scope="module", params=LAYOUTS)
def outcomes(request: pytest.FixtureRequest, reference: Reference, world: World) -> list[RankOutcome]:
    layout = parse_layout(request.param)
    return world.run(layout.world_size, run_rank, reference.folder, request.param)


def test_logits_are_those_of_transformers(reference: Reference, outcomes: list[RankOutcome]) -> None:
    logits = whole_logits(outcomes)
    assert logits.shape == (BATCH, SEQ, VOCAB)
    assert np.abs(reference.logits).max() > 1  # else 1e-5 would say little
    np.testing.assert_allclose(logits, reference.logits, rtol=0, atol=1e-5)


def test_the_loss_is_that_of_transformers(reference: Reference, outcomes: list[RankOutcome]) -> None:
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(reference.loss, rel=1e-6)


def test_every_rank_reads_only_its_slices(reference: Reference, outcomes: list[RankOutcome]) -> None:
    shapes = tensors_of(reference.folder)
    read_by_all = {name for outcome in outcomes for name in outcome.read}
    assert read_by_all == shapes.keys()
    if len(outcomes) == 1:
        assert outcomes[0].read == shapes
        return
    first_stage, last_stage = outcomes[:2], outcomes[2:]
    shared = first_stage[0].read.keys() & last_stage[0].read.keys()
    assert shared == ({"model.embed_tokens.weight"} if reference.spec.tied_embeddings else set())
    for left, right in (first_stage, last_stage):
        assert left.read.keys() == right.read.keys()
        for name in left.read:
            if len(shapes[name]) == 1 and "_proj" not in name:  # a norm, which every rank holds
                assert left.read[name] == right.read[name] == shapes[name]
            else:
                assert math.prod(left.read[name]) + math.prod(right.read[name]) == math.prod(shapes[name])
                assert left.read[name] != shapes[name]


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the folder's files hold."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def test_the_models_are_what_they_are_meant_to_be(reference: Reference) -> None:
    """Each has the feature that it is here for, as transformers wrote it."""
    spec, names = reference.spec, tensors_of(reference.folder)
    files = len(list(reference.folder.glob("*.safetensors")))
    match spec.family:
        case "llama":
            assert files > 1
            assert spec.rope_scaling is not None
            assert spec.rope_scaling.kind == "llama3"
        case "mistral":
            assert spec.sliding_window == 7 < SEQ
        case "qwen2":
            assert spec.qkv_bias
            assert "model.layers.0.self_attn.k_proj.bias" in names
        case "qwen3":
            assert spec.qk_norm
            assert (spec.head_dim, spec.tied_embeddings) == (10, True)
            assert "lm_head.weight" not in names
    assert sum(math.prod(shape) for shape in names.values()) == spec.parameters
