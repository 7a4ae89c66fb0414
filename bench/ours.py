"""Triaxial's contestant in `bench/training.py`: any layout of the runtime."""

from __future__ import annotations

import torch

from triaxial.model.weights import initial_values
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Shape, build_program
from triaxial.plan.layout import micro_batches, parse_layout
from triaxial.train.optimizer import Optimizer
from triaxial.train.step import make_micro_batches, training_step
from workload import GLOBAL_BATCH, HYPER, SEED, SEQ_LEN, SPEC, Limits, Numbers, Outcome, Tokens, measure


def run_ours(rank: int, layout_text: str, precision: str, limits: Limits) -> Outcome:
    """Train the common model under a layout."""
    layout = parse_layout(layout_text)
    program = build_program(
        SPEC,
        layout,
        shape=Shape(layout.mb, SEQ_LEN),
        num_micro_batches=micro_batches(layout, GLOBAL_BATCH),
        precision=PRECISIONS[precision],
        rank=rank,
    )
    program.load(initial_values(SPEC, SEED))
    optimizer = Optimizer(program.units, HYPER)
    pipelines, index = layout.dp, program.mesh.dp.index
    mine = slice(index * GLOBAL_BATCH // pipelines, (index + 1) * GLOBAL_BATCH // pipelines)

    def step(ids: Tokens, labels: Tokens) -> Numbers:
        parts = make_micro_batches(ids[mine], labels[mine], program.mesh, torch.float32)
        result = training_step(program, optimizer, parts, HYPER.lr)
        return Numbers(result.loss, result.grad_norm, result.bubble_fraction if layout.pp > 1 else None)

    return measure(step, limits)
