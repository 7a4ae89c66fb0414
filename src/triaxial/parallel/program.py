"""`Program`: everything one rank holds of a spread model, built from spec and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from triaxial import BadInput
from triaxial.model.decoder import Block, Embedding, Head, Layer, build_rotation, causal_attention
from triaxial.model.spec import ModelSpec
from triaxial.model.weights import LocalParameter, Slicer, Source
from triaxial.parallel.data import PRECISIONS, Precision, Unit, finish_gradients
from triaxial.parallel.mesh import Mesh, build_mesh
from triaxial.parallel.pipeline import Pipeline
from triaxial.parallel.stage import MicroBatch, Placed, Stage
from triaxial.parallel.tensor import TensorParallel
from triaxial.plan.layout import Layout, check_layout
from triaxial.plan.pipeline.schedule import Schedule, build_schedule
from triaxial.plan.pipeline.stages import stage_cut
from triaxial.plan.pipeline.timeline import Span
from triaxial.plan.pipeline.validity import check_fit


@dataclass(frozen=True)
class Shape:
    """What one micro-batch looks like: sequences and tokens in each."""

    micro_batch: int
    seq_len: int


@dataclass
class Program:
    """One rank's part of a spread model, ready to run forward and backward passes."""

    spec: ModelSpec
    layout: Layout
    schedule: Schedule
    cut: tuple[int, ...]
    mesh: Mesh
    units: list[Unit]
    stages: dict[int, Stage]
    pipeline: Pipeline
    tied: Unit | None
    """The embedding's unit where its other copy is on another pipeline rank."""

    def run(self, micro_batches: Sequence[MicroBatch], *, train: bool = True) -> list[Span]:
        """One pass of the schedule over the micro-batches; with `train` the units hold complete gradients after it."""
        for stage in self.stages.values():
            stage.open_step(micro_batches)
        if train:
            for unit in self.units:
                unit.open_step()
        spans = self.pipeline.run(train=train)
        if train:
            finish_gradients(self.units, self.mesh, self.tied)
        return spans

    def losses(self) -> Tensor:
        """Summed loss of the last run's micro-batches on this rank's pipeline; 0 where the head is elsewhere."""
        last = self.stages.get(self.schedule.num_stages - 1)
        return torch.stack(list(last.losses.values())).sum() if last and last.losses else torch.zeros(())

    def load(self, source: Source) -> None:
        """Give every parameter its values."""
        for unit in self.units:
            unit.load(source)


def build_program(
    spec: ModelSpec,
    layout: Layout,
    *,
    shape: Shape,
    num_micro_batches: int,
    precision: Precision = PRECISIONS["fp32"],
    device: torch.device = torch.device("cpu"),  # noqa: B008
    rank: int = 0,
    schedule: Schedule | None = None,
    timeout: timedelta | None = None,
) -> Program:
    """Build this rank's part. With more than one rank the process group must exist and every rank must call it.

    `schedule` is a table of one's own; without it the layout's schedule is built. `timeout` is how long a rank waits
    for another in a collective or message; None is the backend's default.

    Raises:
        BadInput: a layout that cannot carry this model, or that the runtime does not support.
    """
    check_layout(layout, spec, shape.seq_len)
    check_runnable(layout, spec)
    if schedule is None:
        schedule = build_schedule(
            layout.schedule, ranks=layout.pp, micro_batches=num_micro_batches, virtual_stages=layout.vpp
        )
    check_fit(schedule, layout, num_micro_batches, spec.num_layers + 2)
    cut = layout.cut or stage_cut(spec, shape.seq_len, schedule.placement)
    mesh = build_mesh(layout, rank, spec.num_kv_heads, device, timeout)
    builder = _Builder(spec, layout, mesh, precision, device)
    bounds = list(pairwise(accumulate(cut, initial=0)))
    mine = [stage for stage, place in enumerate(schedule.placement) if place == mesh.pp.index]
    rotation = build_rotation(spec, torch.arange(shape.seq_len, device=device), precision.compute)
    stages = {
        stage: Stage(
            [builder.place(index) for index in range(*bounds[stage])],
            builder.ops.gradients,
            rotation,
            lambda layer: causal_attention(spec, layer),
            recompute=layout.recompute == "full",
        )
        for stage in mine
    }
    tokens = shape.micro_batch * shape.seq_len // (layout.tp if layout.sp else 1)
    pipeline = Pipeline(
        schedule,
        mesh.pp,
        stages,
        message_shape=(tokens, spec.hidden),
        dtype=precision.compute,
        device=device,
        holders=None if layout.sp else mesh.tp,
    )
    tied_elsewhere = spec.tied_embeddings and schedule.placement[0] != schedule.placement[-1]
    tied = builder.embedding if tied_elsewhere else None
    if tied is not None and 0 not in mine:
        tied.counts = False
    return Program(spec, layout, schedule, cut, mesh, builder.units, stages, pipeline, tied)


def check_runnable(layout: Layout, spec: ModelSpec) -> None:
    """Refuse what can be planned but not run yet.

    Raises:
        BadInput: names the axis or the model family.
    """
    if layout.cp > 1 or layout.ep > 1:
        raise BadInput("context and expert parallelism can be planned but not run: use cp=1 and ep=1")
    if spec.layer_norm or spec.learned_positions or not spec.gated_mlp:
        raise BadInput(
            f"{spec.name} can be planned but not run: the decoder has RMS norms, rotary positions and gated MLPs"
        )


class _Builder:
    """Makes blocks and the units that hold their parameters, each unit once."""

    def __init__(self, spec: ModelSpec, layout: Layout, mesh: Mesh, precision: Precision, device: torch.device) -> None:
        self.spec, self._layout, self._mesh, self._precision, self._device = spec, layout, mesh, precision, device
        self.slicer = Slicer(spec, mesh.tp.index, mesh.tp.size, sequence_parallel=layout.sp)
        self.ops = TensorParallel(mesh.tp, sequence_parallel=layout.sp, keep_cheap=layout.recompute != "selective")
        self.units: list[Unit] = []
        self.embedding: Unit | None = None

    def place(self, index: int) -> Placed:
        """Block `index` of the model: the embedding, then the layers, then the head."""
        spec, slicer = self.spec, self.slicer
        if index == 0:
            embedding = self._embedding()
            return _placed(Embedding(embedding.tensors, self.ops, slicer.first_row), embedding)
        if index <= spec.num_layers:
            unit = self._unit(slicer.layer(index - 1))
            return _placed(Layer(unit.tensors, self.ops, spec, index - 1, slicer.kv_heads), unit)
        unit = self._unit(slicer.head())
        if not spec.tied_embeddings:
            return _placed(Head(unit.tensors, self.ops, spec, slicer.first_row), unit)
        embedding = self._embedding()
        tensors = unit.tensors | {"head": embedding.tensors["embedding"]}
        return _placed(Head(tensors, self.ops, spec, slicer.first_row), unit, embedding)

    def _embedding(self) -> Unit:
        if self.embedding is None:
            self.embedding = self._unit(self.slicer.embedding())
        return self.embedding

    def _unit(self, parameters: list[LocalParameter]) -> Unit:
        unit = Unit(parameters, self._mesh, self._layout.zero, self._precision, self._device)
        self.units.append(unit)
        return unit


def _placed(block: Block, *units: Unit) -> Placed:
    for unit in units:
        unit.add_user()
    return Placed(block, units)
