"""Our own engine beside what the planner says of it: TTFT, TPOT and tokens/s by layout, and a server under Poisson traffic.

    triaxial probe --precision bf16
    python bench/own_engine.py [--cluster cluster.toml] [--only layouts|traffic] [--layout tp=2]

The 0.25B Llama of `bench/serving.py` with random weights. Layouts: so many prompts of 512 tokens at once, 49 tokens for
each; medians of three rounds. Traffic: requests of log-normal lengths come by chance to a server of one layout, at a part
of the rate that the planner says it can carry; the simulation gets the same arrivals and lengths.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import click
import httpx2 as httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from serving import CONFIG
from soak import MAX_BATCH, serving
from triaxial.cluster.spec import Cluster, load_cluster
from triaxial.cluster.timings import ServerTimings
from triaxial.measure.probe_server import ANSWER_TOKENS, processor_seconds
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.serving.cost.step import StepCost, step_cost
from triaxial.plan.serving.engine import OURS, OURS_CALLED, Engine
from triaxial.plan.serving.simulation.limits import Limits
from triaxial.plan.serving.simulation.served import Served
from triaxial.plan.serving.simulation.simulate import simulate
from triaxial.plan.serving.traffic import LogNormal, Traffic, at_once, draw_lengths, poisson
from triaxial.plan.serving.workload import Serving
from triaxial.serve.generation import Generator
from triaxial.serve.request import Sampling
from triaxial.serve.settings import EngineSettings

LAYOUTS, BATCHES, ROUNDS = ("tp=1", "tp=2", "pp=2"), (1, 8), 3
PROMPT_TOKENS, NEW_TOKENS = 512, 49
REQUESTS, LOAD = 100, 0.6
INPUTS, OUTPUTS, LONGEST = LogNormal(256, 0.5), LogNormal(32, 0.5), 1024
KV_BYTES = 1 << 30

Figures = dict[str, float]


@click.command()
@click.option("--cluster", "name", default="cluster.toml", show_default=True, help="what `triaxial probe` wrote")
@click.option("--only", type=click.Choice(["layouts", "traffic"]))
@click.option("--layout", help="this one alone; of the traffic tp=2 if not given")
def main(name: str, only: str | None, layout: str | None) -> None:
    """What the planner says of our own engine on this machine, and what it does."""
    cluster = load_cluster(name)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        spec = load_model_spec(str(folder))
        if only != "traffic":
            rows = layouts(folder, spec, cluster, (layout,) if layout else LAYOUTS)
            Console(width=110).print(table("prompts of 512 tokens at once", rows))
        if only != "layouts":
            rows = traffic(folder, spec, cluster, layout or "tp=2")
            Console(width=110).print(table(f"{REQUESTS} requests by chance", rows))


def table(title: str, rows: Iterator[tuple[str, Figures, Figures]]) -> Table:
    """Predicted, measured and the first over the second, less 1."""
    made = Table(title=title)
    for column in ("", "metric", "predicted", "measured", "error"):
        made.add_column(column, justify="left" if column in ("", "metric") else "right")
    for what, predicted, measured in rows:
        for metric, value in predicted.items():
            error = value / measured[metric] - 1
            made.add_row(what, metric, f"{value:.4g}", f"{measured[metric]:.4g}", f"{error:+.1%}")
            what = ""
    return made


def engine_settings(folder: Path, layout: str) -> EngineSettings:
    return EngineSettings(model=str(folder), layout=layout, kv_memory=KV_BYTES)


def priced(
    spec: ModelSpec, cluster: Cluster, settings: EngineSettings, engine: Engine, client: ServerTimings | None = None
) -> StepCost:
    work = Serving(input_len=PROMPT_TOKENS, output_len=NEW_TOKENS, chunk_tokens=settings.step_tokens)
    return step_cost(spec, cluster, settings.parsed_layout, work, engine, client=client)


def limits(cost: StepCost, settings: EngineSettings, max_batch: int) -> Limits:
    kv_tokens = int(KV_BYTES / cost.memory.kv_bytes_per_token)
    return Limits(max_batch=max_batch, chunk_tokens=settings.step_tokens, kv_tokens=kv_tokens)


# Layouts


def layouts(
    folder: Path, spec: ModelSpec, cluster: Cluster, names: tuple[str, ...]
) -> Iterator[tuple[str, Figures, Figures]]:
    for layout in names:
        settings = engine_settings(folder, layout)
        cost = priced(spec, cluster, settings, OURS_CALLED)
        measured = asyncio.run(play_layout(settings))
        for batch in BATCHES:
            lengths = np.full(batch, PROMPT_TOKENS), np.full(batch, NEW_TOKENS)
            served = simulate(at_once(*lengths), cost, limits(cost, settings, settings.max_batch))
            predicted = {
                "TTFT (s)": float(served.ttft_s.mean()),
                "TPOT (s)": float(served.tpot_s.mean()),
                "tokens/s": served.output_tokens_per_s,
            }
            print(
                layout, batch, {k: f"{float(v) * 1e3:.2f} ms" for k, v in parts(cost, batch).items()}, file=sys.stderr
            )
            yield f"{layout}, batch {batch}", predicted, measured[batch]


def parts(cost: StepCost, batch: int) -> dict[str, float]:
    """Where a decode step in the middle of the answers goes, by term."""
    context = batch * (PROMPT_TOKENS + NEW_TOKENS / 2)
    return {term: float(seconds) for term, seconds in cost.parts(0.0, 0.0, float(batch), context).items()}


async def play_layout(settings: EngineSettings) -> dict[int, Figures]:
    async with Generator(settings) as generator:
        found = {}
        for batch in BATCHES:
            await play_batch(generator, batch)  # touches weights and cache for the first time
            rounds = [await play_batch(generator, batch) for _ in range(ROUNDS)]
            found[batch] = {metric: median(one[metric] for one in rounds) for metric in rounds[0]}
        return found


async def play_batch(generator: Generator, batch: int) -> Figures:
    rng = random.Random(batch)
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    answers = await asyncio.gather(
        *(generator.answer(tuple(ids(rng, PROMPT_TOKENS)), sampling, (), lambda _: None) for _ in range(batch))
    )
    seconds = time.perf_counter() - began
    return {
        "TTFT (s)": fmean(answer.ttft_s for answer in answers),
        "TPOT (s)": fmean(answer.tpot_s or 0.0 for answer in answers),
        "tokens/s": batch * NEW_TOKENS / seconds,
    }


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, CONFIG["vocab_size"]) for _ in range(count)]  # type: ignore[call-overload]


# Traffic


def traffic(folder: Path, spec: ModelSpec, cluster: Cluster, layout: str) -> Iterator[tuple[str, Figures, Figures]]:
    settings = engine_settings(folder, layout)
    cost = priced(spec, cluster, settings, OURS)
    sizes = limits(cost, settings, MAX_BATCH)
    lengths = tuple(np.minimum(column, LONGEST) for column in draw_lengths(INPUTS, OUTPUTS, REQUESTS))
    rate = LOAD * simulate(at_once(*lengths), cost, sizes).requests_per_s
    arriving = poisson(*lengths, rate)
    client, measured = asyncio.run(play_traffic(folder, layout, arriving))
    print(f"client's processor seconds: {client}", file=sys.stderr)
    predicted = simulate(arriving, priced(spec, cluster, settings, OURS, client), sizes)
    for percentile in (50, 90):
        yield (
            f"{layout}, {rate:.2f} requests/s, {'median' if percentile == 50 else f'{percentile}th percentile'}",
            of_percentile(predicted, percentile),
            of_percentile(measured, percentile),
        )


def of_percentile(served: Served, percentile: int) -> Figures:
    columns = {"TTFT (s)": served.ttft_s, "TPOT (s)": served.tpot_s, "end to end (s)": served.latency_s}
    return {metric: float(np.nanpercentile(column, percentile)) for metric, column in columns.items()}


async def play_traffic(folder: Path, layout: str, arriving: Traffic) -> tuple[ServerTimings, Served]:
    """Ask a server at the traffic's times: what asking takes of this process, measured before, and what clients saw."""
    rng, times = random.Random(0), np.zeros((len(arriving), 3))
    async with serving(folder, layout) as (process, http):
        for length in (LONGEST, 16, PROMPT_TOKENS):  # warm
            await ask(http, ids(rng, length), 4)
        client = await client_seconds(http, rng)
        prompts = [ids(rng, length) for length in arriving.input_tokens]
        began = time.perf_counter()

        async def one(number: int) -> None:
            await asyncio.sleep(began + arriving.arrival_s[number] - time.perf_counter())
            asked = time.perf_counter()
            first, last = await ask(http, prompts[number], int(arriving.output_tokens[number]))
            times[number] = np.array([asked, first, last]) - began

        await asyncio.gather(*(one(number) for number in range(len(arriving))))
        process.terminate()
    asked, first, last = times.T
    return client, Served(asked, asked, first, last, arriving.input_tokens, arriving.output_tokens, (), 0.0)


async def client_seconds(http: httpx.AsyncClient, rng: random.Random) -> ServerTimings:
    """This process's own processor time, which the server's ranks may lack."""

    async def took(clients: int, tokens: int) -> float:
        before = time.process_time()
        await asyncio.gather(*(ask(http, ids(rng, PROMPT_TOKENS // 2), tokens) for _ in range(clients)))
        return time.process_time() - before

    first = await took(MAX_BATCH, 1) / MAX_BATCH
    return processor_seconds(first, await took(1, ANSWER_TOKENS), await took(MAX_BATCH, ANSWER_TOKENS), MAX_BATCH)


async def ask(http: httpx.AsyncClient, prompt: list[int], count: int) -> tuple[float, float]:
    """When the first and the last token came."""
    first = last = 0.0
    body = {"prompt": prompt, "max_tokens": count, "ignore_eos": True, "temperature": 0, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = time.perf_counter()
                first = first or last
    return first, last


if __name__ == "__main__":
    main()
