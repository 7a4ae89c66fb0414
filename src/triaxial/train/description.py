"""`RUN/model`: what a run's weights are exported with. Kept at its start, for the originals may move or change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from triaxial.files import write_atomically
from triaxial.model.spec import load_model_spec, read_description
from triaxial.model.weights import SafetensorsFolder
from triaxial.train.config import TrainConfig

FOLDER = "model"

GENERATION = "generation_config.json"
_BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_COMPUTED_IN = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


def keep_description(config: TrainConfig) -> None:
    """Put `config.json` and, where the run has them, its tokenizer and generation settings into the run's folder.

    The type that `config.json` names, and that an export has unless it is told otherwise, is that of the weights that
    the run began from; if it began from none, the one it computes in.
    """
    folder = config.out / FOLDER
    if (folder / "config.json").is_file():
        return
    folder.mkdir(exist_ok=True)
    for source, name in _companions(config):
        if source.is_file():
            shutil.copyfile(source, folder / name)
    description = read_description(config.model)
    if config.init:
        dtype = SafetensorsFolder(config.init).dtype(load_model_spec(config.model))
    else:
        dtype = _COMPUTED_IN[config.precision]
    write_atomically(folder / "config.json", config_json(description, dtype))  # the last: all is there when it is


def config_json(description: dict[str, object], dtype: str) -> str:
    """Text of a `config.json` of weights of this type, which transformers called `torch_dtype` before version 5."""
    rest = {key: value for key, value in description.items() if key not in ("dtype", "torch_dtype")}
    return json.dumps(rest | {"dtype": dtype}, indent=2) + "\n"


def _companions(config: TrainConfig) -> list[tuple[Path, str]]:
    """Files that may lie beside the model and the tokenizer, and the names that transformers looks for."""
    beside = []
    if (model := config.init or Path(config.model)).exists():  # else it is a preset
        beside.append(((model if model.is_dir() else model.parent) / GENERATION, GENERATION))
    if config.tokenizer:
        file = config.tokenizer / "tokenizer.json" if config.tokenizer.is_dir() else config.tokenizer
        beside += [(file, "tokenizer.json"), *((file.with_name(name), name) for name in _BESIDE_TOKENIZER)]
    return beside
