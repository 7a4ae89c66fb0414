"""When the gradients of sharded units are sent, and what they come to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from triaxial.model.weights import LocalParameter, Piece
from triaxial.parallel.data import PRECISIONS, Unit, finish_gradients
from triaxial.parallel.mesh import Axis, Pending
from triaxial.parallel.stage import StageUnits

ELEMENTS = 64


class Twins(Axis):
    """An axis of this rank and of another that holds the same numbers; writes down what it starts. A sum arrives when
    it is waited for."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name, (0, 1), 0)
        self.log = log
        self.buffers: dict[int, str] = {}

    def reduce_scatter_async(self, x: Tensor) -> Pending:
        self.log.append(f"scatter {self.buffers[id(x)]}")
        return Pending(self, "reduce_scatter", lambda: 2 * x[: len(x) // 2])

    def all_reduce_async(self, x: Tensor) -> Pending:
        self.log.append(f"replicas {self.buffers[id(x)]}")
        return Pending(self, "all_reduce", lambda: x.mul_(2))


def hybrid(zero: int, log: list[str]) -> tuple[Any, list[Unit]]:
    """Three blocks a, b and c on one of four ranks that shard over two."""
    shard, replicate = Twins("shard", log), Twins("replicate", log)
    nobody = SimpleNamespace(name="tp", size=1)
    mesh = SimpleNamespace(shard=shard, replicate=replicate, tp=nobody, kv=nobody)
    units = []
    for name in "abc":
        vector = LocalParameter(name, (Piece(name, (ELEMENTS,), "zeros", stop=ELEMENTS),))
        unit = Unit([vector], mesh, zero, PRECISIONS["fp32"], torch.device("cpu"))  # type: ignore[arg-type]
        unit.add_user()
        unit.open_step()
        shard.buffers[id(unit._sums)] = replicate.buffers[id(unit.gradient)] = name
        units.append(unit)
    return mesh, units


def backward(units: list[Unit], *, last: bool) -> None:
    """Every block adds one to its gradients."""
    stage = StageUnits([(unit,) for unit in units])
    for place in (2, 1, 0):
        stage.open_backward(place)
        for tensor in units[place].tensors.values():
            tensor.main_grad.add_(1.0)  # type: ignore[attr-defined]
        stage.close_backward(place, last)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_shard_goes_to_its_replicas_while_the_backward_pass_goes_on(zero: int) -> None:
    log: list[str] = []
    mesh, units = hybrid(zero, log)
    backward(units, last=False)
    assert not [line for line in log if line.startswith("replicas")], "more is to come"
    log.clear()
    backward(units, last=True)
    assert log == ["scatter c", "scatter b", "replicas c", "scatter a", "replicas b"]
    finish_gradients(units, mesh, tied=None)
    assert log[5:] == ["replicas a"]
    for unit in units:
        assert unit.gradient.tolist() == [8.0] * (ELEMENTS // 2), "two micro-batches on four ranks"


def test_the_gradient_of_two_users_goes_to_its_replicas_once() -> None:
    log: list[str] = []
    mesh, units = hybrid(2, log)
    units[0].add_user()
    units[0].open_step()
    backward([units[0], units[1], units[0]], last=True)
    finish_gradients(units[:2], mesh, tied=None)
    assert sorted(log) == ["replicas a", "replicas b", "scatter a", "scatter a", "scatter b"]
    assert units[0].gradient.tolist() == [8.0] * (ELEMENTS // 2)
