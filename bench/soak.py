"""A server at 1.5 x its capacity for minutes, with clients that go away and ranks that are killed: is all answered?

    python bench/soak.py [--minutes 10] [--layout tp=2,dp=2] [--kill-every 120] [--seed 0]

A random-weight Llama is served from this machine. First its capacity is measured: as many requests at a time as it
decodes, one after another. Then requests arrive at 1.5 times that rate (Poisson); one in five clients goes away at a
random moment, and a random rank is killed with SIGKILL every two minutes. In the end every request must have been
answered (a whole answer, 429, or a clear error), no block may be in use, and the server's memory must not have grown.
Exit code 1 if any of that is not so.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import httpx2 as httpx
import psutil
from rich.console import Console
from rich.table import Table

from triaxial.plan.layout import parse_layout

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 256, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
MAX_BATCH, MAX_QUEUE = 8, 24
OVERLOAD = 1.5
GOES_AWAY = 0.2
"""Part of the clients."""
CAPACITY_S = 20
ANSWER_LIMIT_S = 90
"""A request that has no end by then hangs."""
GROWTH = 0.1
"""Of the server's memory from a fifth of the time to the end that counts as flat."""
WORKER = "triaxial.serve.worker"

WHOLE, REFUSED, CLEAR, LEFT, BROKEN, HANGS = "whole answer", "429", "clear error", "client left", "BROKEN", "HANGS"


@dataclass
class Seen:
    """What came of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Texts of clear errors and of what is none."""
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass
class Watched:
    """The server from outside, once a second: seconds since the start of the load, and what was seen then."""

    memory_bytes: list[tuple[float, int]] = field(default_factory=list)
    """Of the front process."""
    down_s: float = 0.0
    """Time in which /health was not 200."""
    kills: int = 0
    longest_recovery_s: float = 0.0


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--layout", default="tp=2,dp=2", show_default=True)
@click.option("--kill-every", default=120.0, show_default=True, help="seconds")
@click.option("--seed", default=0, show_default=True)
def main(minutes: float, layout: str, kill_every: float, seed: int) -> None:
    """A server at 1.5 x its capacity, with clients that go away and ranks that are killed: is all answered?"""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        fine = asyncio.run(soak(Path(folder), minutes, layout, kill_every, seed))
    sys.exit(0 if fine else 1)


async def soak(folder: Path, minutes: float, layout: str, kill_every: float, seed: int) -> bool:
    rng = random.Random(seed)
    places = MAX_BATCH * parse_layout(layout).dp
    async with serving(folder, layout) as (process, http):
        await closed_loop(http, rng, places, seconds=5)  # warm
        capacity = await closed_loop(http, rng, places, CAPACITY_S)
        begin, seen, watched = time.monotonic(), Seen(), Watched()
        watching = asyncio.create_task(watch(process, http, watched, begin))
        killing = asyncio.create_task(kill(process, http, watched, rng, kill_every))
        asking = set[asyncio.Task[None]]()
        while time.monotonic() - begin < minutes * 60:
            await asyncio.sleep(rng.expovariate(OVERLOAD * capacity))
            task = asyncio.create_task(ask(http, rng, seen))
            asking.add(task)
            task.add_done_callback(asking.discard)
        killing.cancel()
        await asyncio.gather(*asking)
        left = await blocks_in_use(http)
        watching.cancel()
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 60)
    seconds = time.monotonic() - begin
    return report(seen, watched, capacity, seconds, left, code, layout)


@asynccontextmanager
async def serving(folder: Path, layout: str) -> AsyncIterator[tuple[subprocess.Popen[str], httpx.AsyncClient]]:
    limits = ("--max-batch", str(MAX_BATCH), "--max-queue", str(MAX_QUEUE))
    command = [
        sys.executable,
        "-m",
        "triaxial",
        "serve",
        str(folder / "config.json"),
        "--layout",
        layout,
        "--port",
        "0",
    ]
    process = subprocess.Popen([*command, *limits], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while not (found := re.search(r"on (http://\S+)/v1", line := await asyncio.to_thread(process.stderr.readline))):
            if not line:
                raise SystemExit(f"the server ended with code {process.wait()}")
        drain = asyncio.create_task(asyncio.to_thread(process.stderr.read))
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=found[1], timeout=ANSWER_LIMIT_S, limits=unlimited) as http:
            yield process, http
        await drain
    finally:
        if process.poll() is None:
            process.kill()


def prompt_and_length(rng: random.Random) -> tuple[list[int], int]:
    """Mostly short prompts and some long; 8 to 64 tokens to write."""
    length = rng.randrange(4, 64) if rng.random() < 0.8 else rng.randrange(64, 512)
    return [rng.randrange(256) for _ in range(length)], rng.randrange(8, 65)


async def closed_loop(http: httpx.AsyncClient, rng: random.Random, places: int, seconds: float) -> float:
    """Requests a second when there are always as many as are decoded together."""
    done, deadline = 0, time.monotonic() + seconds

    async def one_after_another() -> None:
        nonlocal done
        while time.monotonic() < deadline:
            prompt, length = prompt_and_length(rng)
            body = {"prompt": prompt, "max_tokens": length, "ignore_eos": True}
            (await http.post("/v1/completions", json=body)).raise_for_status()
            done += time.monotonic() < deadline

    await asyncio.gather(*(one_after_another() for _ in range(places)))
    return done / seconds


async def ask(http: httpx.AsyncClient, rng: random.Random, seen: Seen) -> None:
    """One client: it streams or not, and perhaps goes away."""
    prompt, length = prompt_and_length(rng)
    stream, patience = rng.random() < 0.8, rng.uniform(0, 3) if rng.random() < GOES_AWAY else ANSWER_LIMIT_S
    body = {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "stream": stream}
    try:
        async with asyncio.timeout(patience):
            outcome, text = await (streamed(http, body, seen) if stream else whole(http, body))
    except TimeoutError:
        outcome, text = (LEFT if patience < ANSWER_LIMIT_S else HANGS), ""
    except httpx.HTTPError as error:
        outcome, text = BROKEN, repr(error)
    seen.outcomes[outcome] += 1
    seen.tokens += length if outcome == WHOLE else 0
    if text:
        seen.errors[re.sub(r"\d+(\.\d+)?", "N", text)] += 1


async def whole(http: httpx.AsyncClient, body: dict[str, object]) -> tuple[str, str]:
    response = await http.post("/v1/completions", json=body)
    if response.status_code == 200:
        fits = response.json()["usage"]["completion_tokens"] == body["max_tokens"]
        return (WHOLE, "") if fits else (BROKEN, "too few tokens")
    return refusal(response.status_code, response.text)


async def streamed(http: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> tuple[str, str]:
    begin, tokens, error, ended = time.monotonic(), 0, "", False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return refusal(response.status_code, (await response.aread()).decode())
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                error = event["error"]["message"] if "error" in event else error
                tokens += "choices" in event
                if tokens == 1:
                    seen.first_token_s.append(time.monotonic() - begin)
    if error and ended:
        return CLEAR, error
    return (WHOLE, "") if ended and tokens == body["max_tokens"] else (BROKEN, f"{tokens} events, ended: {ended}")


def refusal(status: int, body: str) -> tuple[str, str]:
    if status == 429:
        return REFUSED, ""
    try:
        return (CLEAR if status in (408, 503) else BROKEN), f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, LookupError):
        return BROKEN, f"{status}: {body[:80]}"


async def watch(process: subprocess.Popen[str], http: httpx.AsyncClient, watched: Watched, begin: float) -> None:
    front = psutil.Process(process.pid)
    while True:
        asked = time.monotonic()
        healthy = (await http.get("/health")).status_code == 200
        await asyncio.sleep(max(0.0, 1 - (time.monotonic() - asked)))
        watched.down_s += 0 if healthy else time.monotonic() - asked
        watched.memory_bytes.append((time.monotonic() - begin, front.memory_info().rss))


async def kill(
    process: subprocess.Popen[str], http: httpx.AsyncClient, watched: Watched, rng: random.Random, every_s: float
) -> None:
    """Kill a random rank, wait until all is well again, and so on."""
    while True:
        await asyncio.sleep(every_s / 2 if watched.kills == 0 else every_s)
        children = psutil.Process(process.pid).children()
        rng.choice([child for child in children if WORKER in child.cmdline()]).kill()
        watched.kills, killed = watched.kills + 1, time.monotonic()
        await asyncio.sleep(1)
        while (await http.get("/health")).status_code != 200:
            await asyncio.sleep(0.1)
        watched.longest_recovery_s = max(watched.longest_recovery_s, time.monotonic() - killed)


async def blocks_in_use(http: httpx.AsyncClient) -> float:
    """Part of the KV cache that is still held when all requests have ended; they get a moment to notice."""
    await asyncio.sleep(2)
    lines = (await http.get("/metrics")).text.splitlines()
    gauges = ("vllm:kv_cache_usage_perc{", "vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(gauges))


def report(seen: Seen, watched: Watched, capacity: float, seconds: float, left: float, code: int, layout: str) -> bool:
    """Print the table; whether everything is as it must be."""
    total = seen.outcomes.total()
    early = statistics.median(size for at, size in watched.memory_bytes if seconds * 0.15 <= at <= seconds * 0.25)
    late = statistics.median(size for at, size in watched.memory_bytes if at >= seconds * 0.9)
    checks = {
        "all requests answered": seen.outcomes[BROKEN] + seen.outcomes[HANGS] == 0,
        "blocks in use at the end are 0": left == 0,
        "memory is flat": late < early * (1 + GROWTH),
        "ends with code 0": code == 0,
    }
    table = Table(title=f"soak: {layout}, {seconds / 60:.1f} minutes at {OVERLOAD} x capacity")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("capacity, requests/s", f"{capacity:.1f}")
    table.add_row("requests", f"{total:,}")
    for outcome in (WHOLE, REFUSED, CLEAR, LEFT, BROKEN, HANGS):
        table.add_row(f"  {outcome}", f"{seen.outcomes[outcome]:,}")
    first = sorted(seen.first_token_s)
    table.add_row(
        "TTFT, median / 99th percentile, s", f"{first[len(first) // 2]:.2f} / {first[len(first) * 99 // 100]:.2f}"
    )
    table.add_row("tokens/s of whole answers", f"{seen.tokens / seconds:,.0f}")
    table.add_row("ranks killed / longest recovery, s", f"{watched.kills} / {watched.longest_recovery_s:.1f}")
    table.add_row("/health not 200, s", f"{watched.down_s:.0f}")
    table.add_row("front's memory at 20 % / at the end, MiB", f"{early / 2**20:.1f} / {late / 2**20:.1f}")
    for name, fine in checks.items():
        table.add_row(name, "yes" if fine else "NO")
    console = Console(width=100)
    console.print(table)
    for text, count in seen.errors.most_common(8):
        console.print(f"{count:6,} x {text}", highlight=False)
    return all(checks.values())


if __name__ == "__main__":
    main()
