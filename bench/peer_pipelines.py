"""The peers of `bench/training.py` that run torch.distributed.pipelining, alone and over DTensor's tensor parallelism.

The model is cut as Triaxial cuts it (embedding and head weighed in), so that only the runtimes differ.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from peer_model import Llama
from peers import DTYPES, Update, loss_function, spread
from triaxial.plan.pipeline.generators import stage_placement
from triaxial.plan.pipeline.stages import stage_cut
from workload import GLOBAL_BATCH, SEQ_LEN, SPEC, Limits, Numbers, Outcome, Tokens, measure

VIRTUAL_STAGES = {"1f1b": 1, "zb-h1": 1, "interleaved": 2, "zb-v": 2}


def run_pipeline(rank: int, what: str, precision: str, limits: Limits) -> Outcome:
    """A pipeline of two ranks under schedule `what`; with four processes each rank is cut in two by DTensor."""
    tp = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, tp), mesh_dim_names=("pp", "tp"))
    group, here, virtual = mesh.get_group("pp"), mesh.get_local_rank("pp"), VIRTUAL_STAGES[what]
    last = 2 * virtual - 1
    mine = [here] if virtual == 1 else [here, last - here if what == "zb-v" else here + 2]
    bounds = list(pairwise(accumulate(stage_cut(SPEC, SEQ_LEN, stage_placement(what, 2, virtual)), initial=0)))
    modules = [Llama(DTYPES[precision], *bounds[stage]) for stage in mine]
    if tp > 1:
        modules = [spread(module, mesh["tp"]) for module in modules]
    stages = [
        PipelineStage(module, stage, last + 1, torch.device("cpu"), group=group)
        for stage, module in zip(mine, modules, strict=True)
    ]
    schedule = make_schedule(what, stages)
    update = Update((p for p in nn.ModuleList(modules).parameters()), pipeline=group)

    def step(ids: Tokens, labels: Tokens) -> Numbers:
        inputs = (torch.from_numpy(ids),) if 0 in mine else ()
        losses: list[Tensor] = []
        ends = {"target": torch.from_numpy(labels), "losses": losses} if last in mine else {}
        with loss_parallel() if tp > 1 else nullcontext():
            schedule.step(*inputs, **ends, return_outputs=False)
        whole = [loss.full_tensor() if isinstance(loss, DTensor) else loss for loss in losses]
        loss = float(torch.stack(whole).detach().mean()) if whole else None
        return Numbers(loss, update.step())

    return measure(step, limits)


def make_schedule(what: str, stages: list[PipelineStage]):  # type: ignore[no-untyped-def]
    """PyTorch's schedule of that name; ZB-H1 is what its interleaved zero-bubble schedule is with one stage a rank."""
    if what == "1f1b":
        return Schedule1F1B(stages[0], GLOBAL_BATCH, loss_fn=loss_function)
    kinds = {
        "interleaved": ScheduleInterleaved1F1B,
        "zb-h1": ScheduleInterleavedZeroBubble,
        "zb-v": ScheduleZBVZeroBubble,
    }
    return kinds[what](stages, GLOBAL_BATCH, loss_fn=loss_function)
