"""The same model in plain PyTorch, spread with PyTorch's own tools as a user would: peers of `bench/training.py`.

In fp32 the parameters are fp32. In bf16 FSDP2 keeps fp32 parameters and computes in bf16 (MixedPrecisionPolicy with
fp32 reductions); the others hold bf16 parameters, add up gradients in bf16 over the micro-batches, and keep fp32
masters that clipping and AdamW work on. Initial values, data and hyperparameters are those of Triaxial, so that every
contestant must arrive at the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peer_model import Llama, sequence_parallel_plan, tensor_parallel_plan
from workload import GLOBAL_BATCH, HYPER, Limits, Numbers, Outcome, Tokens, measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Update:
    """Clipping by the global norm and fused AdamW, on fp32 masters where the parameters are bf16."""

    def __init__(self, parameters: Iterable[nn.Parameter], pipeline: dist.ProcessGroup | None = None) -> None:
        self._parameters, self._pipeline = list(parameters), pipeline
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        kinds: dict[tuple[bool, bool], list[Tensor]] = {}
        for master in self._masters:  # the fused kernel takes no mix of plain and distributed tensors
            kinds.setdefault((isinstance(master, DTensor), master.ndim > 1), []).append(master)
        groups = [
            {"params": group, "weight_decay": HYPER.weight_decay if decays else 0.0}
            for (_, decays), group in kinds.items()
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, fused=True
        )

    def step(self) -> float:
        """Update the parameters; returns the gradient norm."""
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if master is not parameter:
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = self._clip()
        self._adamw.step()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if master is not parameter:
                with torch.no_grad():
                    parameter.copy_(master)
        self._adamw.zero_grad()
        return float(norm)

    def _clip(self) -> Tensor:
        plain = [m for m in self._masters if not isinstance(m, DTensor)]
        distributed = [m for m in self._masters if isinstance(m, DTensor)]
        squared = torch.zeros(())
        for group in (plain, distributed):
            if group:
                norm = get_total_norm([m.grad for m in group if m.grad is not None])
                squared += (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
        if self._pipeline is not None:
            dist.all_reduce(squared, group=self._pipeline)
        total = squared.sqrt()
        for group in (plain, distributed):
            if group:
                clip_grads_with_norm_(group, HYPER.clip_norm, total)
        return total


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labels [batch, seq] under logits [batch, seq, vocab]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def train(
    model: nn.Module,
    limits: Limits,
    *,
    data_parallel: bool = False,
    around_pass: Callable[[], AbstractContextManager[object]] = nullcontext,
    before_last: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Outcome:
    """Time steps of accumulation over micro-batches of one sequence.

    Args:
        around_pass: context of every forward and backward pass.
        before_last: context of those of all micro-batches but the last.
    """
    update = Update(model.parameters())
    size, rank = (dist.get_world_size(), dist.get_rank()) if data_parallel else (1, 0)
    count = GLOBAL_BATCH // size

    def step(ids: Tokens, labels: Tokens) -> Numbers:
        total = torch.zeros(())
        for i in range(rank * count, (rank + 1) * count):
            is_last = i + 1 == (rank + 1) * count
            with around_pass(), nullcontext() if is_last else before_last():
                x, y = torch.from_numpy(ids[i : i + 1]), torch.from_numpy(labels[i : i + 1])
                loss = loss_function(model(x), y) / count
                loss.backward()
                loss = loss.detach()
                total += loss.full_tensor() if isinstance(loss, DTensor) else loss
        if data_parallel:
            dist.all_reduce(total)
        return Numbers(float(total) / size, update.step())

    return measure(step, limits)


def run_plain(rank: int, what: str, precision: str, limits: Limits) -> Outcome:
    """One process."""
    return train(Llama(DTYPES[precision]), limits)


def run_ddp(rank: int, what: str, precision: str, limits: Limits) -> Outcome:
    """DistributedDataParallel; gradients travel with the last micro-batch (`no_sync`)."""
    model = DistributedDataParallel(Llama(DTYPES[precision]), gradient_as_bucket_view=True)
    return train(model, limits, data_parallel=True, before_last=model.no_sync)


def run_fsdp2(rank: int, what: str, precision: str, limits: Limits) -> Outcome:
    """`fully_shard` of every layer and of the rest; `what` "zero-2" keeps parameters whole between the passes."""
    model = Llama(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kinds = {} if precision == "fp32" else {"mp_policy": policy}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = partial(fully_shard, mesh=mesh, reshard_after_forward=False if what == "zero-2" else None, **kinds)
    for layer in model.layers.values():
        shard(layer)
    shard(model)
    return train(model, limits, data_parallel=True)


def run_tp(rank: int, what: str, precision: str, limits: Limits) -> Outcome:
    """`parallelize_module` with the plan of PyTorch's tutorial; `what` "sp" adds sequence parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return train(
        spread(Llama(DTYPES[precision]), mesh, sequence_parallel=what == "sp"), limits, around_pass=loss_parallel
    )


def spread(model: Llama, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> Llama:
    """Cut a model, or a stage of it, over a mesh."""
    plan = sequence_parallel_plan if sequence_parallel else tensor_parallel_plan
    for layer in model.layers.values():
        parallelize_module(layer, mesh, plan(layer))
    parallelize_module(model, mesh, plan(model))
    return model
