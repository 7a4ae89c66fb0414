"""What the probe of our engine runs is what the engine runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from triaxial.measure import probe_engine
from triaxial.measure.stopwatch import Stopwatch
from triaxial.model.spec import load_model_spec
from triaxial.parallel.mesh import Axis
from triaxial.plan.serving.cost.probed import product_seconds

WATCH = Stopwatch(Axis("world", (0,), 0), torch.device("cpu"), 1e-3)


def test_steps_take_what_a_scheduler_would_send() -> None:
    step = probe_engine._decoding(3, held=20)
    assert step.first.tolist() == [20, 20, 20]
    assert step.counts.tolist() == [1, 1, 1]
    assert step.sample.all()
    blocks = step.tables.ravel().tolist()
    assert len(set(blocks)) == len(blocks) == 6  # two blocks of 16 tokens each, nobody's twice
    prompt = probe_engine._prompt(20, slot=2)
    assert prompt.counts.tolist() == [20]
    assert prompt.tables.ravel().tolist() == blocks[4:]


@torch.inference_mode()
def test_a_rank_runs_them() -> None:
    rank = probe_engine._Rank(WATCH, load_model_spec("tiny-byte").model_copy(update={"num_layers": 1}), "fp32")
    rank.run(probe_engine._prompt(20, slot=1))
    assert rank.seconds(probe_engine._decoding(2, held=20)) > 0


@torch.inference_mode()
def test_larger_products_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_engine, "_MEMORY_BYTES", 8 << 20)
    monkeypatch.setattr(probe_engine, "_ROWS", (1, 256))
    monkeypatch.setattr(probe_engine, "_WEIGHTS", ((64, 64), (512, 512), (1024, 1024)))
    products = list(probe_engine._products(WATCH, torch.float32))
    assert [product.rows for product in products] == [1, 256]
    for rows in (1, 16, 256):
        sizes = [float(product_seconds(products, rows, size, size)) for size in (64, 512, 1024)]
        assert all(small < large for small, large in pairwise(sizes))
    assert product_seconds(products, 512, 512, 512) == 2 * product_seconds(products, 256, 512, 512)
