"""Hugging Face in and out: what a spread run began from is what its export holds, bit for bit, and transformers reads
it as it read the original."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
from triaxial import BadInput
from triaxial.model.spec import load_model_spec, preset_names, read_description
from triaxial.model.weights import Piece, SafetensorsFolder, global_tensors, initial_values
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Shape, build_program
from triaxial.train import export
from triaxial.train.checkpoint.folder import checkpoints_of, folder_of
from triaxial.train.checkpoint.save import Policy, Saver
from triaxial.train.checkpoint.state import TrainingState
from triaxial.train.config import TrainConfig
from triaxial.train.description import FOLDER, config_json, keep_description
from triaxial.train.export import export_weights, open_checkpoint
from triaxial.train.optimizer import Hyperparameters, Optimizer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "vocab_size": 101, "max_position_embeddings": 64, "initializer_range": 0.12,
    "tie_word_embeddings": False,
}  # fmt: skip
TIED = SIZES | {"tie_word_embeddings": True}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
LATE_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "llama, tied, all biases": lambda: LlamaForCausalLM(LlamaConfig(**TIED, **BIASES, rope_parameters=LINEAR_ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **LATE_WINDOW)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**TIED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 10})),
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**TIED | {"head_dim": 10})),
}
LAYOUT = "tp=2,pp=2"
IDS = torch.arange(48).view(2, 24) * 7 % 101


@dataclass(frozen=True)
class Trip:
    """A model that transformers saved, a run that began from it and took no step, and the run's export."""

    original: Path
    run: Path
    export: Path


def save_untrained(rank: int, config: TrainConfig) -> None:
    spec, layout = load_model_spec(config.model), config.parsed_layout
    precision = PRECISIONS[config.precision]
    program = build_program(spec, layout, shape=Shape(1, 8), num_micro_batches=2, precision=precision, rank=rank)
    program.load(SafetensorsFolder(config.init) if config.init else initial_values(spec, config.seed))
    state = TrainingState(program.units, Optimizer(program.units, Hyperparameters()))
    job = {"model": spec.model_dump(mode="json", exclude={"name"})}
    with Saver(config.out, state, program.mesh, job, Policy()) as saver:
        saver.start(0)
    if rank == 0:
        keep_description(config)


def save_run(world: World, run: Path, **settings: Any) -> Path:
    config = TrainConfig(**{"data": Path("none"), "out": run, "layout": LAYOUT} | settings)
    world.run(config.parsed_layout.world_size, save_untrained, config)
    return run


def export_run(run: Path, folder: Path, dtype: str | None = None, **options: Any) -> export.Exported:
    return export_weights(run / FOLDER, open_checkpoint(run)[0], folder, dtype, **options)


def saved_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of one and biases of zero would hide a mistake
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if name == "llama" else "1GB")
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def described(folder: Path | str) -> dict[str, Any]:
    return load_model_spec(folder).model_dump(exclude={"name"})


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(IDS).logits
    return result


@pytest.fixture(scope="module", params=MODELS)
def trip(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    base = tmp_path_factory.mktemp("trip")
    dtype = torch.bfloat16 if "tied" in request.param else torch.float32
    original = saved_model(request.param, base / "original", dtype)
    run = save_run(world, base / "run", model=str(original), init=original)
    export_run(run, base / "export", shard_bytes=1_000_000 if "tied" in request.param else 20_000)
    return Trip(original, run, base / "export")


def test_every_tensor_comes_back_bitwise(trip: Trip) -> None:
    before, after = tensors_of(trip.original), tensors_of(trip.export)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def test_transformers_reads_the_same_config_and_computes_the_same_logits(trip: Trip) -> None:
    before, after = (
        AutoConfig.from_pretrained(place).to_dict() | {"_name_or_path": ""} for place in (trip.original, trip.export)
    )
    assert after == before
    assert described(trip.export) == described(trip.original)
    assert torch.equal(logits(trip.export), logits(trip.original))


def test_files_are_split_and_indexed_as_transformers_does(trip: Trip) -> None:
    index = trip.export / "model.safetensors.index.json"
    files = sorted(path.name for path in trip.export.glob("*.safetensors"))
    if not index.exists():
        assert files == ["model.safetensors"]
        return
    written = json.loads(index.read_text())
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(written["weight_map"].values())) == files
    tensors = tensors_of(trip.export)
    assert written["weight_map"].keys() == tensors.keys()
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        held = [tensors[name].nbytes for name, place in written["weight_map"].items() if place == file]
        assert sum(held) <= 20_000 or len(held) == 1


# The type, and where the description comes from.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with everything in it."""
    folder = saved_model("qwen2", tmp_path_factory.mktemp("model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja", "pytorch_model.bin"):
        (folder / name).write_text(f"text of {name}")
    return folder


@pytest.fixture(scope="module")
def run(world: World, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return save_run(world, run, model=str(folder), init=folder, tokenizer=folder, layout="dp=2,zero=3")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_another_type_is_written_on_request(run: Path, folder: Path, tmp_path: Path, dtype: str) -> None:
    done = export_run(run, tmp_path / "out", dtype)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].to(getattr(torch, dtype))) for name in before)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    assert (done.tensors, done.files, done.dtype) == (len(before), 1, dtype)
    assert done.bytes == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize("layout", ["tp=1", "dp=2,zero=3"])
def test_a_run_in_bf16_keeps_the_fp32_weights_that_it_began_from(
    world: World, folder: Path, tmp_path: Path, layout: str
) -> None:
    run = save_run(world, tmp_path / "run", model=str(folder), init=folder, layout=layout, precision="bf16")
    assert export_run(run, tmp_path / "out").dtype == "float32"
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_run_from_random_values_has_the_type_it_computes_in(world: World, tmp_path: Path) -> None:
    run = save_run(world, tmp_path / "run", model="tiny-byte", layout="tp=1", precision="bf16")
    assert export_run(run, tmp_path / "out").dtype == "bfloat16"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (model.dtype, model.config.model_type) == (torch.bfloat16, "llama")
    piece = global_tensors(load_model_spec("tiny-byte"))[0]
    expected = initial_values(load_model_spec("tiny-byte"), 0)(piece).bfloat16()
    assert torch.equal(model.get_input_embeddings().weight, expected)


def test_tokenizer_and_generation_settings_come_along_and_nothing_else(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(run, out)
    kept = {"tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", *kept}
    for name in kept:
        assert (out / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("preset", sorted({*preset_names()} - {"gpt3-175b"}))  # transformers has no such architecture
def test_transformers_reads_every_preset_as_we_do(preset: str, tmp_path: Path) -> None:
    """What transformers writes, having read it, describes the same model."""
    (tmp_path / "config.json").write_text(config_json(read_description(preset), "bfloat16"))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert described(tmp_path / "again") == described(preset)


def test_large_tensors_are_read_in_pieces(run: Path, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(export, "_READ_ELEMENTS", 100)
    source, sizes = open_checkpoint(run)[0], []

    def watched(piece: Piece) -> Tensor:
        values = source(piece)
        sizes.append(values.numel())
        return values

    export_weights(run / FOLDER, watched, tmp_path / "out")
    assert max(sizes) <= 100
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)


# What is refused, and that nothing is left of it.


def one_sentence(error: pytest.ExceptionInfo[BadInput]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_folder_that_holds_something_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput) as error:
        export_run(run, tmp_path / "out")
    assert one_sentence(error) == f"{tmp_path / 'out'} exists and is not empty: choose another DIR"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_empty_folder_and_what_a_killed_export_left_are_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00001-of-00007.safetensors").write_text("half")
    export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_an_export_that_fails_leaves_nothing(run: Path, tmp_path: Path) -> None:
    source = open_checkpoint(run)[0]

    def failing(piece: Piece) -> Tensor:
        if piece.name == "model.norm.weight":
            raise BadInput("it broke")
        return source(piece)

    with pytest.raises(BadInput, match="it broke"):
        export_weights(run / FOLDER, failing, tmp_path / "out", shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_nothing_is_left(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(BadInput, match=r"cannot write .*out: .*No space left on device") as error:
        export_run(run, tmp_path / "out")
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="dtype 'int8' is not one of float16, bfloat16, float32, float64"):
        export_run(run, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        open_checkpoint(tmp_path)
    assert one_sentence(error) == f"{tmp_path} holds no checkpoint"
    with pytest.raises(BadInput) as error:
        open_checkpoint(run, 3)
    assert one_sentence(error) == f"{run} holds no checkpoint after step 3, only 0"


def test_a_damaged_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    run = save_run(world, tmp_path / "run", model="tiny-byte", layout="tp=1")
    file = folder_of(checkpoints_of(run), 0) / "rank-00000.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"x")
    for step in (None, 0):
        with pytest.raises(BadInput, match=r"rank-00000\.safetensors is damaged") as error:
            open_checkpoint(run, step)
        one_sentence(error)


def test_a_description_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    run = save_run(world, tmp_path / "run", model="tiny-byte", layout="tp=1")
    path = run / FOLDER / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    with pytest.raises(BadInput, match=r"rope_theta is 20000\.0 and was 10000\.0") as error:
        open_checkpoint(run)
    one_sentence(error)
    path.unlink()
    with pytest.raises(BadInput, match=r"no run's folder: it holds no model/config\.json") as error:
        open_checkpoint(run)
    one_sentence(error)


FIRST = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({FIRST: None}, f"cannot read {FIRST}"),
        ({FIRST: torch.ones(40, 31)}, rf"{FIRST} is \[40, 31\], not \[40, 32\]"),
        ({FIRST: torch.ones(40, 32, dtype=torch.int8)}, f"{FIRST} is I8, not one of F16, BF16, F32, F64"),
        ({"model.layers.0.extra": torch.ones(1)}, "model.layers.0.extra is no tensor of model"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(40, 32)}, "model.layers.3.mlp.up_proj.weight is no tensor"),
    ],
    ids=["missing", "shape", "type", "unknown", "a layer too many"],
)
def test_weights_of_another_model_are_refused_before_training(
    folder: Path, tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    wrong = tmp_path / "model"
    wrong.mkdir()
    tensors = {name: tensor for name, tensor in (tensors_of(folder) | change).items() if tensor is not None}
    save_file(tensors, wrong / "model.safetensors")
    spec = load_model_spec(folder).model_copy(update={"name": "model"})
    with pytest.raises(BadInput, match=words) as error:
        SafetensorsFolder(wrong).check(spec)
    one_sentence(error)


def test_tensors_that_transformers_ignores_are_ignored(tmp_path: Path) -> None:
    original = saved_model("qwen2, tied", tmp_path / "model")
    more = {"lm_head.weight": torch.ones(101, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors_of(original) | more, original / "model.safetensors")
    SafetensorsFolder(original).check(load_model_spec(original))
