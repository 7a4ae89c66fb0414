"""What one layout saves, any other continues from, exactly as if nothing had happened."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.training import HYPER, Case, build, reference, step_batches, tiny_spec
from tests.world import World
from triaxial.model.weights import global_tensors
from triaxial.plan.layout import Layout, parse_layout
from triaxial.train.checkpoint.boxes import Box, common, from_text, volume
from triaxial.train.checkpoint.folder import checkpoints_of, folder_of, read_manifest
from triaxial.train.checkpoint.load import open_newest, restore
from triaxial.train.checkpoint.save import Policy, Saver
from triaxial.train.checkpoint.state import TrainingState
from triaxial.train.optimizer import learning_rate
from triaxial.train.step import training_step

STEPS = 4
CASES = {  # both with vocabularies that every tp pads differently, and fewer kv heads than tp=4
    "untied": Case(tiny_spec(num_layers=3, qk_norm=True), seq_len=8, steps=STEPS),
    "tied": Case(
        tiny_spec(num_layers=3, tied_embeddings=True, qkv_bias=True, out_bias=True, vocab=37), seq_len=8, steps=STEPS
    ),
}
SAVED_AFTER = 2
SAVED = (
    "tp=1,mb=2",
    "tp=2,pp=2,mb=2",
    "dp=4",
    "pp=2,dp=2,zero=1",
    "tp=2,pp=2,dp=2,zero=2,sp=1",
    "tp=2,pp=2,dp=2,zero=3",
)
LOADED = (*SAVED, "tp=4,mb=4", "pp=4,mb=2")


def save(rank: int, case: Case, layout: Layout, run: Path) -> None:
    program, optimizer = build(rank, case, layout)
    for step in range(SAVED_AFTER):
        lr = learning_rate(step, case.steps, HYPER)
        training_step(program, optimizer, step_batches(program, case, step), lr)
    state = TrainingState(program.units, optimizer)
    with Saver(run, state, program.mesh, {}, Policy()) as saver:
        saver.start(SAVED_AFTER)
        saver.finish()
        assert [save.error for save in saver.completed()] == [None]


Numbers = list[tuple[float, float]]
"""Loss and gradient norm of every step."""


def go_on(rank: int, case: Case, layout: Layout, runs: dict[str, Path]) -> dict[str, Numbers]:
    """The steps after each run's checkpoint; whatever was in memory before must not matter."""
    program, optimizer = build(rank, replace(case, seed=99), layout)
    numbers: dict[str, Numbers] = {}
    for saved, run in runs.items():
        training_step(program, optimizer, step_batches(program, case, 7), 1.0)
        restored = restore(run, TrainingState(program.units, optimizer), program.mesh, {})
        assert restored is not None
        assert (restored.step, restored.notes) == (SAVED_AFTER, [])
        numbers[saved] = []
        for step in range(SAVED_AFTER, case.steps):
            lr = learning_rate(step, case.steps, HYPER)
            result = training_step(program, optimizer, step_batches(program, case, step), lr)
            numbers[saved].append((result.loss, result.grad_norm))
    return numbers


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A run with one checkpoint, by case and layout."""
    made = {(name, text): tmp_path_factory.mktemp("run") for name in CASES for text in SAVED}
    for (name, text), run in made.items():
        layout = parse_layout(text)
        world.run(layout.world_size, save, CASES[name], layout, run)
    return made


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("name", CASES)
def test_a_layout_continues_what_any_other_saved(
    world: World, runs: dict[tuple[str, str], Path], name: str, loaded: str
) -> None:
    case, layout = CASES[name], parse_layout(loaded)
    saved = {text: runs[name, text] for text in SAVED}
    uninterrupted = reference(world, case)
    for by_run in world.run(layout.world_size, go_on, case, layout, saved):
        assert by_run.keys() == saved.keys()
        for text, numbers in by_run.items():
            losses, norms = zip(*numbers, strict=True)
            np.testing.assert_allclose(losses, uninterrupted.losses[SAVED_AFTER:], rtol=1e-12, atol=0, err_msg=text)
            np.testing.assert_allclose(norms, uninterrupted.grad_norms[SAVED_AFTER:], rtol=1e-12, atol=0, err_msg=text)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", CASES)
def test_every_element_is_stored_once_and_padding_is_not(
    runs: dict[tuple[str, str], Path], name: str, saved: str
) -> None:
    stored: dict[str, list[Box]] = defaultdict(list)
    manifest = read_manifest(folder_of(checkpoints_of(runs[name, saved]), SAVED_AFTER))
    for file in manifest.files.values():
        for part in file.parts:
            tensor, box = from_text(part)
            assert all(common(box, other) is None for other in stored[tensor]), part
            stored[tensor].append(box)
    sizes = {piece.name: int(np.prod(piece.shape)) for piece in global_tensors(CASES[name].spec)}
    assert {tensor: sum(map(volume, boxes)) for tensor, boxes in stored.items()} == sizes


def test_ranks_that_hold_the_same_share_the_writing(runs: dict[tuple[str, str], Path]) -> None:
    manifest = read_manifest(folder_of(checkpoints_of(runs["untied", "dp=4"]), SAVED_AFTER))
    sizes = [file.bytes for file in manifest.files.values()]
    assert len(sizes) == 4
    assert max(sizes) < 1.1 * min(sizes)


def test_the_weights_can_be_read_by_name_whatever_the_layout(runs: dict[tuple[str, str], Path]) -> None:
    """As an export does."""
    whole: Any = {}
    for saved in SAVED:
        stored, _ = open_newest(runs["tied", saved])
        for piece in global_tensors(CASES["tied"].spec):
            values = stored(piece).numpy()
            np.testing.assert_allclose(values, whole.setdefault(piece.name, values), rtol=1e-9, atol=1e-12)
    assert whole["model.embed_tokens.weight"].shape == (37, 32)
    assert "lm_head.weight" not in whole
