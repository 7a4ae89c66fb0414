"""What the parity tests run on every rank: a few optimizer steps of a tiny model in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch

from tests.world import World
from triaxial.model import IGNORE
from triaxial.model.spec import ModelSpec
from triaxial.model.weights import Piece, initial_values
from triaxial.parallel import mesh
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Program, Shape, build_program
from triaxial.parallel.stage import MicroBatch
from triaxial.plan.layout import Layout, micro_batches
from triaxial.plan.pipeline.schedule import Schedule
from triaxial.train.optimizer import Hyperparameters, Optimizer, learning_rate
from triaxial.train.step import make_micro_batches, own_samples, training_step

HYPER = Hyperparameters(lr=1e-2, warmup_steps=2, clip_norm=0.5)
"""A clip norm below the tiny models' gradient norms, so that clipping acts."""


@dataclass(frozen=True)
class Case:
    """A job that every layout must do alike."""

    spec: ModelSpec
    seq_len: int = 16
    global_batch: int = 8
    steps: int = 5
    precision: str = "fp64"
    ignore_unevenly: bool = False
    seed: int = 0


@dataclass
class Outcome:
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    """Of step 0, whole tensors by global name."""
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    """Before step 0."""


def tiny_spec(**changes: Any) -> ModelSpec:
    base = {
        "name": "tiny", "family": "llama", "num_layers": 5, "hidden": 32, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "ffn": 40, "vocab": 101, "max_positions": 64, "norm_eps": 1e-5, "init_std": 0.2,
    }  # fmt: skip
    return ModelSpec(**(base | changes))


def batch_of(case: Case, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels [global_batch, seq] of a step; the same for every layout."""
    generator = np.random.default_rng([case.seed, step])
    tokens = generator.integers(0, case.spec.vocab, (case.global_batch, case.seq_len + 1))
    ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if case.ignore_unevenly:  # sample i keeps only its first 1 + 2 i labels, the last sample none
        for i, row in enumerate(labels):
            row[1 + 2 * i :] = IGNORE
        labels[-1] = IGNORE
    return ids, labels


def build(rank: int, case: Case, layout: Layout, schedule: Schedule | None = None) -> tuple[Program, Optimizer]:
    program = build_program(
        case.spec,
        layout,
        shape=Shape(layout.mb, case.seq_len),
        num_micro_batches=micro_batches(layout, case.global_batch),
        precision=PRECISIONS[case.precision],
        rank=rank,
        schedule=schedule,
    )
    program.load(initial_values(case.spec, case.seed))
    return program, Optimizer(program.units, HYPER)


def step_batches(program: Program, case: Case, step: int) -> list[MicroBatch]:
    ids, labels = batch_of(case, step)
    mine = own_samples(np.arange(case.global_batch), program.mesh)
    loss_dtype = torch.float64 if case.precision == "fp64" else torch.float32
    return make_micro_batches(ids[mine], labels[mine], program.mesh, loss_dtype)


def train(rank: int, case: Case, layout: Layout, schedule: Schedule | None = None) -> tuple[Outcome, list[Part]]:
    """Run the case on this rank: its numbers, and its parts of the initial parameters and of step 0's gradients."""
    program, optimizer = build(rank, case, layout, schedule)
    parts = local_parts(program, "parameter")
    program.run(step_batches(program, case, 0))
    parts += local_parts(program, "gradient")
    outcome = Outcome([], [])
    for step in range(case.steps):
        lr = learning_rate(step, case.steps, HYPER)
        result = training_step(program, optimizer, step_batches(program, case, step), lr)
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
    return outcome, parts


def train_over_gloo(
    rank: int, case: Case, layout: Layout, schedule: Schedule | None = None
) -> tuple[Outcome, list[Part]]:
    """`train` as if every rank were on a host of its own, so that nothing goes through shared memory."""
    with mock.patch.object(mesh, "host_identity", return_value=str(rank)):
        return train(rank, case, layout, schedule)


@dataclass(frozen=True)
class Part:
    """A slice of a global tensor as one rank holds it."""

    kind: Literal["parameter", "gradient"]
    piece: Piece
    values: np.ndarray


Job = Callable[[int, Case, Layout, Schedule | None], tuple[Outcome, list[Part]]]


def local_parts(program: Program, kind: Literal["parameter", "gradient"]) -> list[Part]:
    parts = []
    for unit in program.units:
        whole = unit.shard.all_gather(unit.master if kind == "parameter" else unit.gradient).clone()
        for _, piece, offset in unit.places():
            values = whole[offset : offset + math.prod(piece.local_shape)].view(piece.local_shape)
            parts.append(Part(kind, piece, values.numpy().copy()))
    return parts


def train_everywhere(
    world: World, case: Case, layout: Layout, schedule: Schedule | None = None, job: Job = train
) -> Outcome:
    """The case under a layout, with the ranks' parts put together; ranks that hold the same part must agree.

    `schedule` takes the place of the layout's.
    """
    results = world.run(layout.world_size, job, case, layout, schedule)
    outcome = results[0][0]
    for other, _ in results[1:]:
        assert other.losses == outcome.losses
        assert other.grad_norms == outcome.grad_norms
    for _, parts in results:
        for part in parts:
            whole = outcome.parameters if part.kind == "parameter" else outcome.gradients
            full = whole.setdefault(part.piece.name, np.full(part.piece.shape, np.nan))
            where = tuple([slice(None)] * part.piece.dim + [slice(part.piece.start, part.piece.stop)])
            known = ~np.isnan(full[where])
            np.testing.assert_allclose(part.values[known], full[where][known], rtol=1e-10, atol=1e-14)
            full[where] = part.values
    for name, full in (outcome.parameters | outcome.gradients).items():
        assert not np.isnan(full).any(), f"no rank holds all of {name}"
    return outcome


_references: dict[Case, Outcome] = {}


def reference(world: World, case: Case) -> Outcome:
    """The case in one process with one micro-batch; computed once for all tests."""
    if case not in _references:
        _references[case] = train_everywhere(world, case, Layout(mb=case.global_batch))
    return _references[case]


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_same(outcome: Outcome, reference: Outcome, tolerance: float = 1e-12) -> None:
    """Loss and gradient norm of every step, initial parameters bitwise, and step 0's gradients agree."""
    np.testing.assert_allclose(outcome.losses, reference.losses, rtol=tolerance, atol=0)
    np.testing.assert_allclose(outcome.grad_norms, reference.grad_norms, rtol=tolerance, atol=0)
    assert outcome.parameters.keys() == reference.parameters.keys()
    for name, values in reference.parameters.items():
        np.testing.assert_array_equal(outcome.parameters[name], values, err_msg=name)
    for name, values in reference.gradients.items():
        assert relative_error(outcome.gradients[name], values) <= tolerance, name
