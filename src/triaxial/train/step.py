"""One training step: micro-batches in, updated parameters and the step's numbers out."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from triaxial.model import IGNORE
from triaxial.parallel.data import gradient_norm_squared
from triaxial.parallel.mesh import Mesh
from triaxial.parallel.program import Program
from triaxial.parallel.stage import MicroBatch
from triaxial.plan.pipeline.timeline import Span
from triaxial.train.optimizer import Optimizer

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class StepResult:
    """The same numbers on every rank, but for `spans`, which are this rank's own."""

    loss: float
    """Mean cross-entropy over the global batch's valid labels."""
    grad_norm: float
    """Before clipping, over all parameters."""
    bubble_fraction: float
    """1 - busy time / (last end - first begin over all ranks), mean over ranks."""
    peak_memory_bytes: int
    """Largest over the ranks so far: resident memory of the process on a CPU, allocated memory on a GPU."""
    data_s: float
    """Longest that a rank has read its samples, while the step waited."""
    spans: list[Span]


def own_samples(indices: Tokens, mesh: Mesh) -> Tokens:
    """The part of the global batch's sample indices that this rank's pipeline processes."""
    per_rank = len(indices) // mesh.dp.size
    return indices[mesh.dp.index * per_rank : (mesh.dp.index + 1) * per_rank]


def make_micro_batches(ids: Tokens, labels: Tokens, mesh: Mesh, loss_dtype: torch.dtype) -> list[MicroBatch]:
    """Cut this pipeline's samples [n, seq] into micro-batches whose losses add up to the global mean.

    Every loss is divided by the number of valid labels in the whole global batch, so neither uneven masks nor
    micro-batches nor ranks change what is averaged.
    """
    device, mb = mesh.device, mesh.layout.mb
    valid = torch.tensor(float(np.count_nonzero(labels != IGNORE)), dtype=torch.float64, device=device)
    total = mesh.dp.all_reduce(valid).clamp(min=1)
    scale = (1.0 / total).to(loss_dtype)
    return [
        MicroBatch(_flat(ids[i : i + mb], device), _flat(labels[i : i + mb], device), scale)
        for i in range(0, len(ids), mb)
    ]


def _flat(tokens: Tokens, device: torch.device) -> torch.Tensor:
    """[mb, seq] to [seq * mb], sequence-major."""
    return torch.from_numpy(np.ascontiguousarray(tokens.T)).flatten().to(device)


def training_step(
    program: Program,
    optimizer: Optimizer,
    micro_batches: Sequence[MicroBatch],
    lr: float,
    before_update: Callable[[], None] = lambda: None,
    data_s: float = 0.0,
) -> StepResult:
    """Forward, backward, clipping and update; `before_update` is called when parameters are about to change.

    Args:
        data_s: that this rank has read its samples.
    """
    spans = program.run(micro_batches)
    result = _summary(program, micro_batches, spans, data_s=data_s)
    before_update()
    optimizer.step(lr, result.grad_norm)
    return result


def evaluate(program: Program, micro_batches: Sequence[MicroBatch]) -> float:
    """Mean loss over the global batch, without gradients."""
    spans = program.run(micro_batches, train=False)
    return _summary(program, micro_batches, spans, norm=False).loss


def _summary(
    program: Program,
    micro_batches: Sequence[MicroBatch],
    spans: list[Span],
    norm: bool = True,
    data_s: float = 0.0,
) -> StepResult:
    """Share what the ranks know separately, in one small message."""
    mesh = program.mesh
    loss = program.losses().double() * micro_batches[0].loss_scale.double() if mesh.tp.index == 0 else 0.0
    squared = gradient_norm_squared(program.units, mesh) if norm else 0.0
    busy = sum(span.end_s - span.begin_s for span in spans)
    times = [spans[0].begin_s, spans[-1].end_s, data_s]
    numbers = [float(loss), float(squared), busy, *times, peak_memory_bytes(mesh.device)]
    mine = torch.tensor([numbers], dtype=torch.float64, device=mesh.device)
    everyone = mesh.world.all_gather(mine).cpu()
    loss_sum, norm_squared, busy_sum = everyone[:, :3].sum(0).tolist()
    elapsed = float(everyone[:, 4].max() - everyone[:, 3].min())
    bubble = 1 - busy_sum / len(everyone) / elapsed
    data_s, memory = everyone[:, 5:].max(0).values.tolist()
    return StepResult(loss_sum, norm_squared**0.5, bubble, int(memory), data_s, spans)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # the process's own; getrusage carries over the peak of the process that started it
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
