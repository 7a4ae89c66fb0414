"""The peers of `bench/serving.py`, and how every contestant is measured. Imports nothing of Triaxial: vLLM's Python
runs this file too: `python serving_peers.py CONTESTANT MODEL_FOLDER`."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 48, 3
BATCHES = (1, 8, 16)
VOCAB = 32_000

Measured = dict[str, Any]
"""`ttft_s`, and `tokens_per_s` by batch (as text, for JSON)."""

Run = Callable[[int, int], object]
"""Continues so many prompts by so many tokens each."""


def prompts(batch: int) -> list[tuple[int, ...]]:
    rng = random.Random(batch)
    return [tuple(rng.randrange(3, VOCAB) for _ in range(PROMPT_TOKENS)) for _ in range(batch)]


def measure(run: Run) -> Measured:
    """Time a contestant; the first run of each batch is not counted."""

    def seconds(batch: int, count: int) -> float:
        begin = time.perf_counter()
        run(batch, count)
        return time.perf_counter() - begin

    first, speeds = [], {}
    for batch in BATCHES:
        run(batch, 4)
        rounds = [(seconds(batch, 1), seconds(batch, 1 + NEW_TOKENS)) for _ in range(ROUNDS)]
        if batch == 1:
            first = [short for short, _ in rounds]
        speeds[str(batch)] = statistics.median(batch * NEW_TOKENS / (long - short) for short, long in rounds)
    return {"ttft_s": statistics.median(first), "tokens_per_s": speeds}


def transformers(folder: str) -> Measured:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()

    def run(batch: int, count: int) -> None:
        ids = torch.tensor(prompts(batch))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )

    return measure(run)


def vllm(how: str, folder: str) -> Measured:
    """`how`: 1 thread, 2 threads, tp=2 or pp=2."""
    cores = {"1 thread": "0", "2 threads": "0-1", "tp=2": "0|1", "pp=2": "0|1"}[how]
    spread = {"tp=2": {"tensor_parallel_size": 2}, "pp=2": {"pipeline_parallel_size": 2}}.get(how, {})
    run = vllm_engine(cores, folder, **spread)
    return measure(lambda batch, count: run(prompts(batch), count))


def vllm_engine(cores: str, folder: str, **spread: int) -> Callable[[list[tuple[int, ...]], int], None]:
    """An engine on these cores, as what continues prompts by so many tokens each."""
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
        enable_prefix_caching=False, **spread,
    )  # fmt: skip

    def run(work: list[tuple[int, ...]], count: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": list(prompt)} for prompt in work], sampling, use_tqdm=False)

    return run


def vllm_replicas(folder: str) -> Measured:
    """Two engines in processes of their own, each on one core with every other prompt."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for core in ("0", "1"):
        mine, theirs = context.Pipe()
        context.Process(target=_replica, args=(theirs, core, folder)).start()
        pipes.append(mine)

    def run(batch: int, count: int) -> None:
        busy = [(pipe, prompts(batch)[i :: len(pipes)]) for i, pipe in enumerate(pipes)]
        busy = [(pipe, work) for pipe, work in busy if work]
        for pipe, work in busy:
            pipe.send((work, count))
        for pipe, _ in busy:
            pipe.recv()

    found = measure(run)
    for pipe in pipes:
        pipe.send(None)
    return found


def _replica(pipe: Any, core: str, folder: str) -> None:
    run = vllm_engine(core, folder)
    while (task := pipe.recv()) is not None:
        run(*task)
        pipe.send(True)


if __name__ == "__main__":
    contestant, _, how = sys.argv[1].partition(" ")
    if contestant == "transformers":
        found = transformers(sys.argv[2])
    else:
        found = vllm_replicas(sys.argv[2]) if how == "dp=2" else vllm(how, sys.argv[2])
    print(json.dumps(found))
