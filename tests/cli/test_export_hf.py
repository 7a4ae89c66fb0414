"""`triaxial train --init` and `triaxial export-hf` from outside, against transformers on the way in and on the way out."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from tests.command import MODEL, SEQ, Workplace, read_metrics
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from triaxial.cli import main
from triaxial.train.corpus import build_corpus
from triaxial.train.order import sample_indices
from triaxial.train.tokenizer import ByteTokenizer

BATCH, SEED = 4, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a model that transformers saved, and a run of two steps that began from it, spread over four ranks."""
    place = Workplace(tmp_path_factory.mktemp("place"))
    torch.manual_seed(0)
    sizes = {name: value for name, value in MODEL.items() if name != "architectures"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(place.folder / "hf")
    pickled = place.folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(MODEL))
    torch.save({"model.norm.weight": torch.ones(32)}, pickled / "pytorch_model.bin")
    done = place.run(
        "train", "--init", "hf", "--data", "data", "--seq-len", str(SEQ), "--layout", "tp=2,pp=2", "--steps", "2",
        "--global-batch", str(BATCH), "--seed", str(SEED), "--lr", "1e-2", "--warmup-steps", "1",
        "--checkpoint-every", "1", "--out", "run",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "run: run\n"), done.stderr
    return place


def loss_of_transformers(place: Workplace, folder: str, step: int) -> float:
    """On the samples that the run sees in a step."""
    corpus = build_corpus(place.folder / "data", ByteTokenizer(), place.cache / "triaxial" / "corpora")
    indices = sample_indices(step, BATCH, len(corpus.split(SEQ, 0.01)[0]), SEED)
    ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in corpus.batch(indices, SEQ))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(place.folder / folder, dtype="auto")(ids).logits
    return torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item()


def test_training_begins_where_the_folder_ends(place: Workplace) -> None:
    losses = [step["loss"] for step in read_metrics(place.folder / "run")[0]]
    assert losses[0] == pytest.approx(loss_of_transformers(place, "hf", 0), rel=1e-5)
    assert abs(losses[1] - loss_of_transformers(place, "hf", 1)) > 1e-2  # or the next test would say nothing


def test_transformers_goes_on_from_the_export(place: Workplace) -> None:
    """With the weights after one step it has the loss that the run had in the next."""
    done = place.run("export-hf", "run", "out", "--step", "1", "--dtype", "float64")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 30 tensors in float64, 0.3 MB in 1 file, after step 1\n"
    loss = read_metrics(place.folder / "run")[0][1]["loss"]
    assert loss_of_transformers(place, "out", 1) == pytest.approx(loss, rel=1e-5)
    assert json.loads((place.folder / "out" / "config.json").read_text())["dtype"] == "float64"


USUAL = ("--data", "data", "--seq-len", str(SEQ), "--out", "new")
REFUSED = {
    "a folder that holds something": (("export-hf", "run", "data"), "data exists and is not empty: choose another DIR"),
    "a run without a checkpoint": (("export-hf", "empty", "new"), "empty holds no checkpoint"),
    "no such run": (("export-hf", "nowhere", "new"), "nowhere holds no checkpoint"),
    "no such step": (("export-hf", "run", "new", "--step", "7"), "run holds no checkpoint after step 7, only 1, 2"),
    "no such type": (("export-hf", "run", "new", "--dtype", "int8"), "dtype 'int8' is not one of float16, bfloat16,"),
    "a folder without weights": (
        ("train", "config.json", "--init", "data", *USUAL),
        "data holds no model.safetensors (nor an index of several)",
    ),
    "weights as a pickle": (
        ("train", "--init", "pickled", *USUAL),
        "pickled holds no model.safetensors (nor an index of several)",
    ),
    "weights of another model": (
        ("train", "tiny-byte", "--init", "hf", *USUAL),
        "hf/model.safetensors: model.embed_tokens.weight is [256, 32], not [256, 256]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, sentence = REFUSED[case]
    before = place.contents()
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(sys, "argv", ["triaxial", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    assert output.err.startswith(f"triaxial: {sentence}")
    assert (output.err.count("\n"), ended.value.code, output.out) == (1, 2, "")
    assert place.contents() == before
