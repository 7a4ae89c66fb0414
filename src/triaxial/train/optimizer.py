"""AdamW over flat shards, global-norm clipping and the learning-rate curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triaxial.parallel.data import Unit


@dataclass(frozen=True)
class Hyperparameters:
    """Of AdamW (arXiv 1711.05101) and its schedule."""

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a part of `lr`."""
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Largest global gradient norm; a longer gradient is scaled down to it."""


def learning_rate(step: int, total_steps: int, hyper: Hyperparameters) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr_ratio * lr` at the last step (counted from 0)."""
    if step < hyper.warmup_steps:
        return hyper.lr * (step + 1) / hyper.warmup_steps
    span = max(1, total_steps - 1 - hyper.warmup_steps)
    progress = min(1.0, (step - hyper.warmup_steps) / span)
    floor = hyper.lr * hyper.min_lr_ratio
    return floor + (hyper.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Moments:
    """AdamW's running means of a unit's gradient and of its square, flat like the shard."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer:
    """AdamW on each rank's shards of the master parameters; matrices decay, vectors do not."""

    def __init__(self, units: Sequence[Unit], hyper: Hyperparameters) -> None:
        self._units, self._hyper = units, hyper
        self.moments = {unit: Moments(torch.zeros_like(unit.master), torch.zeros_like(unit.master)) for unit in units}
        groups: list[dict[str, Any]] = []
        slices: list[tuple[Tensor, Unit, slice]] = []
        for decay, part in ((hyper.weight_decay, 0), (0.0, 1)):
            where = [(unit, place) for unit in units if (place := unit.decaying()[part]) is not None]
            parameters = [unit.master[place].detach() for unit, place in where]
            for parameter, (unit, place) in zip(parameters, where, strict=True):
                parameter.grad = unit.gradient[place]
                slices.append((parameter, unit, place))
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay})
        self._adamw = torch.optim.AdamW(
            groups, lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, fused=True
        )
        for parameter, unit, place in slices:
            moments = self.moments[unit]
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": moments.exp_avg[place],
                "exp_avg_sq": moments.exp_avg_sq[place],
            }

    def continue_from(self, steps: int) -> None:
        """The moments have been given their values after so many steps."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the global norm, update the shards, and bring them back to every rank's parameters."""
        if gradient_norm > self._hyper.clip_norm:
            for unit in self._units:
                unit.gradient.mul_(self._hyper.clip_norm / gradient_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for unit in self._units:
            unit.publish()
