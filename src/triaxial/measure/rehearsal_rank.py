"""One rank of a rehearsal: the runtime's own pipeline, mesh and units, with waits in place of compute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from triaxial.measure.fabric import PORT
from triaxial.measure.script import Script
from triaxial.model.weights import LocalParameter, Piece
from triaxial.parallel.data import PRECISIONS, Unit, finish_gradients
from triaxial.parallel.emulated import EmulatedBlocks, Waits
from triaxial.parallel.mesh import Mesh, build_mesh
from triaxial.parallel.pipeline import Pipeline
from triaxial.plan.pipeline.schedule import build_schedule
from triaxial.plan.pipeline.timeline import Span

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepRecord:
    """A step as one rank saw it, in seconds of the clock that all ranks of a machine share."""

    spans: tuple[Span, ...]
    tp_s: float
    dp_s: float
    """Inside actions."""
    complete_at_s: float
    """When it had summed its gradients over the data-parallel ranks."""
    tied_at_s: float
    """And exchanged that of a table that both ends of the pipeline hold."""
    reduced_at_s: float
    """When all ranks had their gradients."""
    end_s: float


@dataclass(frozen=True)
class RankRecord:
    steps: tuple[StepRecord, ...]
    """The first is for warming up."""
    sent_bytes: dict[str, dict[str, int]]
    """In a step, by axis and kind of collective, as `Axis.traffic` counts them."""


def play(rank: int, say: Callable[[], None], store: str, script: Script, steps: int) -> RankRecord:
    """Run one more than `steps` steps; `say` is called after each."""
    os.environ["GLOO_SOCKET_IFNAME"] = f"{PORT}0"
    torch.set_num_threads(1)
    world = script.layout.world_size
    file = dist.FileStore(store, world)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=file, rank=rank, world_size=world)
    mesh = build_mesh(script.layout, rank, script.layout.tp, CPU)
    player = _Player(script, mesh)
    dist.barrier()
    records = []
    for _ in range(steps + 1):
        records.append(player.step())
        say()
    dist.barrier()
    axes = (mesh.tp, mesh.pp, mesh.shard, mesh.replicate, mesh.ends)
    sent = {axis.name: {kind: count // (steps + 1) for kind, count in axis.traffic.items()} for axis in axes}
    dist.destroy_process_group()
    return RankRecord(tuple(records), sent)


class _Player:
    """What a rank holds of the script."""

    def __init__(self, script: Script, mesh: Mesh) -> None:
        self._script, self._mesh, self._waits = script, mesh, Waits()
        layout = script.layout
        schedule = build_schedule(
            layout.schedule, ranks=layout.pp, micro_batches=script.micro_batches, virtual_stages=layout.vpp
        )
        mine = [stage for stage, place in enumerate(schedule.placement) if place == mesh.pp.index]
        units = {stage: [_units(elements, mesh) for elements in script.unit_elements[stage]] for stage in mine}
        shape = (script.message_elements,)
        self._stages = {
            stage: EmulatedBlocks(
                script.stages[stage], units[stage], mesh.tp, sequence_parallel=layout.sp, message_shape=shape
            )
            for stage in mine
        }
        self._units = list(chain.from_iterable(chain.from_iterable(units.values())))
        self._pipeline = Pipeline(schedule, mesh.pp, self._stages, message_shape=shape, dtype=torch.float32, device=CPU)

    def step(self) -> StepRecord:
        """As the trainer's: the schedule, the reductions, one number over all ranks for the norm, the update."""
        script, mesh = self._script, self._mesh
        before_s = self._spent_s()
        for unit in self._units:
            unit.open_step()
        spans = self._pipeline.run()
        spent_s = self._spent_s()
        self._waits.wait(script.slowed_s)
        finish_gradients(self._units, mesh, tied=None)
        complete_at_s = time.perf_counter()
        if script.tied_elements:
            mesh.ends.all_reduce(torch.zeros(script.tied_elements))
        tied_at_s = time.perf_counter()
        mesh.world.all_reduce(torch.zeros(1))
        reduced_at_s = time.perf_counter()
        self._waits.wait(script.update_s)
        for unit in self._units:
            unit.publish()
        return StepRecord(
            spans=tuple(spans),
            tp_s=spent_s["tp"] - before_s["tp"],
            dp_s=spent_s["dp"] - before_s["dp"],
            complete_at_s=complete_at_s,
            tied_at_s=tied_at_s,
            reduced_at_s=reduced_at_s,
            end_s=time.perf_counter(),
        )

    def _spent_s(self) -> dict[str, float]:
        return {axis: sum(stage.spent_s[axis] for stage in self._stages.values()) for axis in ("tp", "dp")}


def _units(elements: int, mesh: Mesh) -> list[Unit]:
    """The parameters of a block, as one vector."""
    if not elements:
        return []
    vector = LocalParameter("block", (Piece("block", (elements,), "zeros", stop=elements),))
    unit = Unit([vector], mesh, mesh.layout.zero, PRECISIONS["bf16"], CPU)
    unit.add_user()
    return [unit]
