"""The work that `bench/training.py` times, the same for every contestant, and how a run is timed."""

from __future__ import annotations

import datetime
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from triaxial.model.spec import ModelSpec
from triaxial.train.optimizer import Hyperparameters

SPEC = ModelSpec(
    name="llama-34m",
    family="llama",
    num_layers=8,
    hidden=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn=1408,
    vocab=8192,
    max_positions=512,
)
SEQ_LEN = 512
GLOBAL_BATCH = 8
"""Sequences in a step; every micro-batch is one of them."""
TOKENS = GLOBAL_BATCH * SEQ_LEN
HYPER = Hyperparameters()
SEED = 0

PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "triaxial.train.step",
)
"""Imported once, before any run: a fresh process is a fork of one that has done nothing but import these."""

Tokens = NDArray[np.int64]
Step = Callable[[Tokens, Tokens], "Numbers"]
"""One training step on ids and labels [global batch, seq], of which a data-parallel rank takes its own part."""


@dataclass(frozen=True)
class Numbers:
    """What one step says of itself; on ranks that do not know the loss it is None."""

    loss: float | None
    grad_norm: float
    bubble: float | None = None


@dataclass(frozen=True)
class Limits:
    """How long to measure: `warmup` steps, then up to `steps`, of which at least two, that fit into `seconds`."""

    warmup: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of one rank, or of all ranks together."""

    step_s: list[float]
    cpu_s: float
    """Processor time of one step, summed over ranks and their threads."""
    peak_rss_bytes: int
    """Of the largest rank."""
    loss: float | None
    grad_norm: float
    bubble: float | None

    @property
    def tokens_per_s(self) -> float:
        return TOKENS / statistics.median(self.step_s)


def batch(step: int) -> tuple[Tokens, Tokens]:
    """Synthetic ids and labels [global batch, seq] of one step: uniform over the vocabulary."""
    drawn = np.random.default_rng((SEED, step)).integers(0, SPEC.vocab, (GLOBAL_BATCH, SEQ_LEN + 1))
    return drawn[:, :-1], drawn[:, 1:]


def measure(step: Step, limits: Limits) -> Outcome:
    """Time a rank's steps."""
    began = time.perf_counter()
    for i in range(limits.warmup):
        last = time.perf_counter()
        numbers = step(*batch(i))
    count = limits.steps
    if limits.warmup:
        left = limits.seconds - (time.perf_counter() - began)
        count = max(2, min(count, int(left / (time.perf_counter() - last))))
    if dist.is_initialized():
        agreed = torch.tensor(count)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        count = int(agreed)
    seconds = []
    used = _cpu_seconds()
    for i in range(limits.warmup, limits.warmup + count):
        data = batch(i)
        begin = time.perf_counter()
        numbers = step(*data)
        seconds.append(time.perf_counter() - begin)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = (_cpu_seconds() - used) / count
    return Outcome(seconds, cpu_s, usage.ru_maxrss * 1024, numbers.loss, numbers.grad_norm, numbers.bubble)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_world(
    contestant: Callable[[int, str, str, Limits], Outcome],
    what: str,
    precision: str,
    limits: Limits,
    *,
    processes: int,
    threads: int,
) -> Outcome:
    """Run `contestant(rank, what, precision, limits)` in fresh processes and put the ranks' outcomes together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, mp_context=context) as pool:
        store = str(Path(folder) / "store")
        futures = [
            pool.submit(_rank, rank, processes, threads, store, contestant, what, precision, limits)
            for rank in range(processes)
        ]
        ranks = [future.result() for future in futures]
    return Outcome(
        [max(step) for step in zip(*(rank.step_s for rank in ranks), strict=True)],
        sum(rank.cpu_s for rank in ranks),
        max(rank.peak_rss_bytes for rank in ranks),
        next(rank.loss for rank in ranks if rank.loss is not None),
        ranks[0].grad_norm,
        ranks[0].bubble,
    )


def _rank(
    rank: int,
    processes: int,
    threads: int,
    store: str,
    contestant: Callable[[int, str, str, Limits], Outcome],
    what: str,
    precision: str,
    limits: Limits,
) -> Outcome:
    torch.set_num_threads(threads)
    if processes == 1:
        return contestant(rank, what, precision, limits)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        return contestant(rank, what, precision, limits)
    finally:
        dist.destroy_process_group()
