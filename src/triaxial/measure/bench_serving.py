"""Serving under every layout: clients that ask the engine again when answered, held against their simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
import psutil
import torch

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.measure.bench import Bench, cuts, run_layouts
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.engine import OURS_CALLED
from triaxial.plan.serving.estimate import ServingEstimate, estimate_serving, traffic_of
from triaxial.plan.serving.workload import Serving
from triaxial.serve.generation import Answer, Generator, run_to_end
from triaxial.serve.request import Sampling
from triaxial.serve.settings import EngineSettings, make_settings

_GIB = 2.0**30

Prompts = Sequence[tuple[tuple[int, ...], int]]
"""Token ids, and how many are to follow."""


@dataclass(frozen=True)
class ServingMeasured:
    """What the engine did: each number the median of several rounds, over whose requests the first two are means."""

    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    """Of all replicas."""
    memory_gib: float
    """Of the fullest rank while it serves: resident memory, or what is taken of a GPU."""


@dataclass(frozen=True)
class ServingComparison:
    """One layout predicted and measured."""

    predicted: ServingEstimate
    measured: ServingMeasured

    @property
    def predicted_s(self) -> float:
        """Of an output token, over all sequences at once."""
        return 1 / self.predicted.output_tokens_per_s

    @property
    def measured_s(self) -> float:
        return 1 / self.measured.output_tokens_per_s

    @property
    def errors(self) -> dict[str, float]:
        """Of every predicted number, relative to the measured one."""
        predicted = {name: getattr(self.predicted, name) for name in ("ttft_s", "tpot_s", "output_tokens_per_s")}
        predicted["memory_gib"] = self.predicted.memory_gib["peak"]
        return {
            name: value / measured - 1 if (measured := getattr(self.measured, name)) else 0.0
            for name, value in predicted.items()
        }


def serving_layouts(model: str, cluster: Cluster, work: Serving) -> list[Layout]:
    """Every cut over all of the cluster's ranks that the engine can run."""
    return [cut for cut in cuts(cluster.num_gpus) if _is_legal(model, cut, work)]


def bench_serving(
    model: str,
    cluster: Cluster,
    work: Serving,
    layouts: Sequence[Layout],
    *,
    rounds: int,
    tell: Callable[[Layout], None],
) -> Bench[ServingEstimate, ServingComparison]:
    """Serve `work` under every layout.

    Args:
        rounds: how often the clients' requests are played.
        tell: called with the layout that starts.

    Raises:
        BadInput: a layout that cannot be priced or decoded.
    """
    spec = load_model_spec(model)

    def predict(layout: Layout) -> ServingEstimate:
        settings = _settings(model, layout, work)
        limited = replace(work, max_batch=settings.max_batch, chunk_tokens=settings.step_tokens)
        return estimate_serving(spec, cluster, limited, layout, OURS_CALLED)

    def run(layout: Layout, predicted: ServingEstimate) -> ServingComparison:
        prompts = _prompts(spec, work, layout)
        measured = run_to_end(_serve(_settings(model, layout, work), prompts, work.concurrency, rounds))
        return ServingComparison(predicted, measured)

    return run_layouts(layouts, predict, run, tell)


def _settings(model: str, layout: Layout, work: Serving) -> EngineSettings:
    """An engine with a slot for every client.

    Raises:
        BadInput: a layout that it cannot decode, or requests longer than the model has positions.
    """
    traffic = traffic_of(work)
    settings = make_settings(
        model=model,
        layout=str(layout),
        precision=work.precision,
        max_batch=work.concurrency,
        max_model_len=int((traffic.input_tokens + traffic.output_tokens).max()),
    )
    settings.model_copy(update={"layout": str(replace(layout, dp=1))}).check()
    return settings


def _is_legal(model: str, layout: Layout, work: Serving) -> bool:
    try:
        _settings(model, layout, work)
    except BadInput:
        return False
    return True


def _prompts(spec: ModelSpec, work: Serving, layout: Layout) -> Prompts:
    """The traffic that the planner simulates, in random tokens."""
    traffic, random = traffic_of(work, layout.dp), np.random.default_rng(0)
    return [
        (tuple(random.integers(spec.vocab, size=prompt).tolist()), int(answer))
        for prompt, answer in zip(traffic.input_tokens, traffic.output_tokens, strict=True)
    ]


async def _serve(settings: EngineSettings, prompts: Prompts, clients: int, rounds: int) -> ServingMeasured:
    async with Generator(settings) as generator:
        await _round(generator, prompts[:clients], clients)  # touches weights and caches for the first time
        played = [await _round(generator, prompts, clients) for _ in range(rounds)]
        memory_gib = _held_bytes(generator.pids) / _GIB
    ttft_s, tpot_s, tokens_per_s = (median(column) for column in zip(*played, strict=True))
    return ServingMeasured(ttft_s, tpot_s, tokens_per_s, memory_gib)


async def _round(generator: Generator, prompts: Prompts, clients: int) -> tuple[float, float, float]:
    """Mean TTFT, mean TPOT and output tokens per second of clients that take one prompt after the other."""
    left, answers = iter(prompts), list[Answer]()

    async def ask() -> None:
        for prompt, count in left:
            sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
            answers.append(await generator.answer(prompt, sampling, (), lambda _: None))

    clock = asyncio.get_running_loop().time
    began = clock()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())
    seconds = clock() - began
    between = [answer.tpot_s for answer in answers if answer.tpot_s is not None]
    return (
        fmean(answer.ttft_s for answer in answers),
        fmean(between) if between else 0.0,
        sum(len(answer.token_ids) for answer in answers) / seconds,
    )


def _held_bytes(pids: Sequence[int]) -> int:
    if torch.cuda.is_available():
        free = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
        return max(total - left for left, total in free)
    return max(int(psutil.Process(pid).memory_info().rss) for pid in pids)
