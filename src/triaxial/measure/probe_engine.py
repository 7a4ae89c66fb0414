"""What a step of Triaxial's own engine takes: measured on its ranks' own code, in a process that is set up like one.

A rank of the engine keeps its weights packed and in large pages, and reads them from memory in every step, since no cache
holds a whole model: products are timed so. What a layer takes beyond its products and its attention is that of passes.
The host's part is what a whole engine takes for a step of a small model beyond what a rank's layers do.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import cycle
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from triaxial import NoAnswer
from triaxial.cluster.timings import EngineRates, EngineTimings, ProductTiming
from triaxial.kernels.operations import kernels_for
from triaxial.measure.probe_layers import LayerRow, fit_passes
from triaxial.measure.probe_server import server_timings
from triaxial.measure.stopwatch import Stopwatch
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.parallel.mesh import Axis, build_mesh
from triaxial.plan.cost.operators import Gemm, Pass
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.operators import layer_operators
from triaxial.plan.serving.cost.probed import product_seconds
from triaxial.plan.workload import Precision
from triaxial.serve.attention import prompt_attention
from triaxial.serve.engine import Engine
from triaxial.serve.operations import linear, pack
from triaxial.serve.ranks import LARGE_PAGES
from triaxial.serve.request import Request, Sampling
from triaxial.serve.runner import DTYPES, Runner
from triaxial.serve.settings import BLOCK_TOKENS, EngineSettings
from triaxial.serve.wire import Entry, Step, StepArrays, decode_step, encode_step

_BUDGET_S = 0.02
_MEMORY_BYTES = 512 << 20
"""Of weights that are read in turn: more than caches hold."""
_ROWS = (1, 4, 16, 64, 256, 512, 1024)
_WEIGHTS = ((1024, 512), (1024, 1024), (3072, 1024), (1024, 2816), (5632, 1024))
"""(out, in)"""
_LARGE = {"hidden": 1024, "num_heads": 16, "num_kv_heads": 8, "head_dim": 64, "ffn": 2816}
_LAYER_BYTES = 48
"""Layers of the large model, times the bytes of an element: half a gigabyte, which no cache holds."""
_SMALL = "tiny-byte"
_SEQUENCES, _PROMPT = 8, 128
_GIVEN = 32
"""Tokens that a small model gives to time its steps."""
_ROUNDS = 5


def engine_timings(watch: Stopwatch, precisions: Sequence[Precision], tell: Callable[[str], None]) -> EngineTimings:
    """All ranks measure what ranks do, at the same time, then the first alone what the host does.

    Raises:
        NoAnswer: a measuring process failed.
    """
    tell("steps of the engine")
    watch.barrier()
    found = [_in_a_rank(watch, "rank", *precisions)]
    watch.barrier()
    if watch.world.index == 0:
        tell("the engine's host")
        found = [found[0], _in_a_rank(watch, "host", precisions[0])]
    if watch.world.size > 1:
        found = [found[0], ""] if len(found) == 1 else found
        dist.broadcast_object_list(found)
    ranks, host = (EngineTimings.model_validate_json(text) for text in found)
    return host.model_copy(update={"rates": ranks.rates, "stage_s": ranks.stage_s})


def _in_a_rank(watch: Stopwatch, *arguments: str) -> str:
    """What this module prints in a process of its own."""
    command = [sys.executable, "-m", __name__, str(watch.device), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | LARGE_PAGES)
    if done.returncode:
        raise NoAnswer(f"measuring the engine failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return done.stdout


def main() -> None:
    device, what, *precisions = sys.argv[1:]
    torch.set_num_threads(1)
    watch = Stopwatch(Axis("world", (0,), 0), torch.device(device), _BUDGET_S)
    with torch.inference_mode():
        if what == "rank":
            rates = {precision: _rates(watch, precision) for precision in precisions}
            found = EngineTimings(rates=rates, stage_s=_stage_seconds(watch, precisions[0]))
        else:
            found = _host(watch, precisions[0])
    print(found.model_dump_json())


# What ranks do


def _rates(watch: Stopwatch, precision: str) -> EngineRates:
    dtype = DTYPES[precision]
    products = tuple(_products(watch, dtype))
    attended = _attention_flop_per_s(watch, dtype)
    spec = load_model_spec(_SMALL).model_copy(update={**_LARGE, "num_layers": _LAYER_BYTES // dtype.itemsize})
    rank = _Rank(watch, spec, precision)
    steps = {n: rank.seconds(_decoding(n, held=1)) for n in (1, _SEQUENCES)}
    rows = [_row(spec, n, precision, products, seconds) for n, seconds in steps.items()]
    for tokens in (16, 64, 2 * _PROMPT, 4 * _PROMPT):
        core = spec.num_layers * 2 * spec.attention_width * tokens * (tokens + 1) / attended
        rows.append(_row(spec, tokens, precision, products, rank.seconds(_prompt(tokens)) - core))
    for slot in range(_SEQUENCES):
        rank.run(_prompt(_PROMPT, slot))
    longer = rank.seconds(_decoding(_SEQUENCES, held=_PROMPT)) - steps[_SEQUENCES]
    token = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    launch_s, bytes_per_s = fit_passes(rows)
    return EngineRates(
        products=products,
        attention_flop_per_s=attended,
        kv_bytes_per_s=token * _SEQUENCES * _PROMPT / max(longer, 1e-9),
        pass_launch_s=launch_s,
        pass_bytes_per_s=bytes_per_s,
    )


def _products(watch: Stopwatch, dtype: torch.dtype) -> Iterator[ProductTiming]:
    """For every number of rows a line over the elements of the matrix."""
    took: dict[int, list[LayerRow]] = {rows: [] for rows in _ROWS}
    for out, into in _WEIGHTS:
        count = _MEMORY_BYTES // (out * into * dtype.itemsize)
        weights = cycle([pack(torch.full((out, into), 0.01, dtype=dtype, device=watch.device)) for _ in range(count)])
        for rows in _ROWS:
            x = torch.full((rows, into), 0.01, dtype=dtype, device=watch.device)
            seconds = watch.seconds(lambda x=x, weights=weights: linear(x, next(weights), None))  # type: ignore[misc]
            took[rows].append(LayerRow(kernels=1, bytes=out * into, seconds=seconds))
    for rows, points in took.items():
        call_s, weights_per_s = fit_passes(points)
        yield ProductTiming(rows=rows, call_s=call_s, weights_per_s=weights_per_s)


def _attention_flop_per_s(watch: Stopwatch, dtype: torch.dtype) -> float:
    """Of a prompt's causal attention: two products of head_dim per head for every key that a query sees."""
    heads, head_dim, tokens = _LARGE["num_heads"], _LARGE["head_dim"], 4 * _PROMPT
    q, k, v = (torch.full((tokens, n, head_dim), 0.01, dtype=dtype, device=watch.device) for n in (heads, 8, 8))
    seconds = watch.seconds(lambda: prompt_attention(q, k, v, kernels_for(q)))
    return 2 * heads * head_dim * tokens * (tokens + 1) / seconds


def _row(spec: ModelSpec, tokens: int, precision: str, products: Sequence[ProductTiming], seconds: float) -> LayerRow:
    """One layer's passes: what the planner counts, and what a step of all layers takes beyond its products."""
    operators = layer_operators(spec, 1, np.array([float(tokens)]), precision, experts=False)  # type: ignore[arg-type]
    gemms = [op for op in operators if isinstance(op, Gemm)]
    passes = [op for op in operators if isinstance(op, Pass)]
    multiplied = sum(float(product_seconds(products, tokens, op.n, op.k)) for op in gemms)
    return LayerRow(
        kernels=float(sum(np.max(op.kernels) for op in passes)),
        bytes=sum(float(np.max(op.bytes)) for op in passes),
        seconds=seconds / spec.num_layers - multiplied,
    )


def _stage_seconds(watch: Stopwatch, precision: str) -> float:
    """Of a rank for a step beside its layers: what a model of one layer takes beyond another layer."""
    small = load_model_spec(_SMALL)
    one, many = (
        _Rank(watch, small.model_copy(update={"num_layers": layers}), precision).seconds(_decoding(1, held=1))
        for layers in (1, small.num_layers)
    )
    return max(0.0, one - (many - one) / (small.num_layers - 1))


class _Rank:
    """A rank that is a whole replica."""

    def __init__(self, watch: Stopwatch, spec: ModelSpec, precision: str) -> None:
        settings = EngineSettings(model=_SMALL, precision=precision, max_batch=_SEQUENCES)
        mesh = build_mesh(Layout(), 0, spec.num_kv_heads, watch.device)
        self._watch, self._runner = watch, Runner(spec, settings, mesh, timedelta(seconds=60))
        self._runner.open_cache(_SEQUENCES * _HOME, _HOME)

    def run(self, step: StepArrays) -> None:
        self._runner.run(step)

    def seconds(self, step: StepArrays) -> float:
        return self._watch.seconds(lambda: self.run(step))


_HOME = -(-2 * _PROMPT // BLOCK_TOKENS)
"""Blocks of a sequence."""


def _decoding(sequences: int, held: int) -> StepArrays:
    """A step that gives each of some sequences its next token after `held` ones."""
    return _step([_entry(slot, held, 1) for slot in range(sequences)])


def _prompt(tokens: int, slot: int = 0) -> StepArrays:
    return _step([_entry(slot, 0, tokens)])


def _entry(slot: int, first: int, tokens: int) -> Entry:
    blocks = [slot * _HOME + place for place in range(-(-(first + tokens) // BLOCK_TOKENS))]
    return Entry(slot, first, [1] * tokens, sample=True, score=False, base=0, blocks=blocks)


def _step(entries: list[Entry]) -> StepArrays:
    return decode_step(encode_step(Step(1, tuple(entries))))


# What the host does


def _host(watch: Stopwatch, precision: str) -> EngineTimings:
    """A line over the sequences of a step: what an engine takes for one beyond its rank."""
    rank = _Rank(watch, load_model_spec(_SMALL), precision)
    whole = asyncio.run(_whole_steps(precision))
    beyond = {n: seconds - rank.seconds(_decoding(n, held=_GIVEN)) for n, seconds in whole.items()}
    sequence_s = max(0.0, (beyond[_SEQUENCES] - beyond[1]) / (_SEQUENCES - 1))
    step_s = max(0.0, beyond[1] - sequence_s)
    server = server_timings(precision, _SEQUENCES, step_s, sequence_s)
    return EngineTimings(rates={}, step_s=step_s, sequence_s=sequence_s, server=server)


async def _whole_steps(precision: str) -> dict[int, float]:
    """Seconds of an engine's steps by the sequences in them."""
    engine = Engine(EngineSettings(model=_SMALL, precision=precision, max_batch=_SEQUENCES))
    await engine.start()

    async def seconds(sequences: int, tokens: int) -> float:
        async def one() -> None:
            async for _ in engine.generate(
                Request("", (1,), Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
            ):
                pass

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(sequences)))
        return time.perf_counter() - began

    try:
        return {
            n: median([await seconds(n, 1 + 2 * _GIVEN) - await seconds(n, 1) for _ in range(_ROUNDS)]) / (2 * _GIVEN)
            for n in (1, _SEQUENCES)
        }
    finally:
        await engine.stop()


if __name__ == "__main__":
    main()
