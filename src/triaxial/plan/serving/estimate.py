"""The price of one layout for some serving work: its requests are simulated on what a step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout
from triaxial.plan.serving.cost.memory import ServingMemory
from triaxial.plan.serving.cost.step import StepCost, step_cost
from triaxial.plan.serving.engine import VLLM, Engine
from triaxial.plan.serving.simulation.limits import BLOCK_TOKENS, Limits
from triaxial.plan.serving.simulation.served import Served
from triaxial.plan.serving.simulation.simulate import simulate
from triaxial.plan.serving.traffic import Traffic, closed_loop, poisson
from triaxial.plan.serving.workload import Serving

REQUESTS_PER_CLIENT = 10
"""Of a closed loop: enough that the first round, in which all clients ask at once, does not decide."""
OPEN_REQUESTS = 1000
"""Of traffic with a rate."""
LENGTH_SPREAD = 0.1
"""Answers end early or late by up to this share: equal ones would keep clients in step for ever."""


@dataclass(frozen=True, kw_only=True)
class ServingEstimate:
    """What one layout does with some serving work."""

    layout: Layout
    engine: str
    ttft_s: float
    """Mean over the requests, like the next."""
    tpot_s: float
    output_tokens_per_s: float
    """Of all replicas."""
    max_batch: int
    """Sequences of this length that one replica's memory holds."""
    decode_batch: float
    """Sequences of a step that decodes, on average."""
    memory_gib: dict[str, float]
    fits: bool
    prefill_s: dict[str, float]
    """One prompt alone, by term."""
    decode_s: dict[str, float]
    """One step of `decode_batch` sequences in the middle of their answers, by term."""

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return {
            **vars(self),
            "layout": str(self.layout),
            "tokens_per_s_per_gpu": self.output_tokens_per_s / self.layout.world_size,
        }


def estimate_serving(
    model: ModelSpec, cluster: Cluster, work: Serving, layout: Layout, engine: Engine = VLLM
) -> ServingEstimate:
    """Price one layout.

    Where not even one request fits, the times are those of GPUs with more memory.

    Raises:
        BadInput: a layout that cannot carry the model on this cluster.
    """
    cost = step_cost(model, cluster, layout, work, engine)
    held = cost.memory.max_sequences(work.input_len + work.output_len)
    served = simulate(traffic_of(work, layout.dp), cost, limits_of(work, cost), replicas=layout.dp)
    batch = max(1.0, served.decode_batch)
    prompt = (work.input_len, work.input_len * (work.input_len + 1) / 2, 0.0, 0.0, 1.0)
    middle = (0.0, 0.0, batch, batch * (work.input_len + work.output_len / 2))
    return ServingEstimate(
        layout=layout,
        engine=engine.name,
        ttft_s=float(served.ttft_s.mean()),
        tpot_s=tpot_seconds(served),
        output_tokens_per_s=served.output_tokens_per_s,
        max_batch=held,
        decode_batch=batch,
        memory_gib=_gib(cost.memory, batch * cost.memory.sequence_bytes(work.input_len + work.output_len)),
        fits=held > 0,
        prefill_s=_numbers(cost.parts(*prompt)),
        decode_s=_numbers(cost.parts(*middle)),
    )


def tpot_seconds(served: Served) -> float:
    """Mean time per output token after the first; 0 where all requests have only one."""
    known = served.tpot_s[~np.isnan(served.tpot_s)]
    return float(known.mean()) if len(known) else 0.0


def traffic_of(work: Serving, replicas: int = 1) -> Traffic:
    """Requests at `work.rate`, enough to fill all replicas, or of `work.concurrency` clients that start at once and ask
    again when answered."""
    requests = OPEN_REQUESTS * replicas if work.rate else REQUESTS_PER_CLIENT * work.concurrency
    inputs = np.full(requests, work.input_len, dtype=np.int64)
    spread = np.random.default_rng(0).uniform(1 - LENGTH_SPREAD, 1 + LENGTH_SPREAD, requests)
    outputs = np.maximum(1, np.rint(work.output_len * spread)).astype(np.int64)
    return poisson(inputs, outputs, work.rate) if work.rate else closed_loop(inputs, outputs, work.concurrency)


def limits_of(work: Serving, cost: StepCost) -> Limits:
    """Sizes of one replica: what the work asks for, as far as the engine and its memory go."""
    engine, memory = cost.engine, cost.memory
    longest = work.input_len + int(work.output_len * (1 + LENGTH_SPREAD)) + 1
    slots = max(1, min(work.max_batch, work.max_batch if work.rate else work.concurrency) - engine.spare_slots)
    if engine.reserves_outputs:
        slots = min(slots, max(1, memory.max_sequences(work.input_len + work.output_len)))
    # whole prompts get room beside the sequences that decode
    chunk = work.chunk_tokens if engine.chunked_prefill else work.chunk_tokens + slots
    window, kv_tokens = memory.farthest_window, memory.max_kv_tokens
    if window is None:  # layers with a window hold less of a sequence than the others: as if memory held more
        kv_tokens = int(memory.kv_bytes_free / memory.sequence_bytes(longest) * longest)
    if memory.max_sequences(longest) == 0:
        kv_tokens = slots * (longest + BLOCK_TOKENS)
    return Limits(max_batch=slots, chunk_tokens=chunk, kv_tokens=kv_tokens, window=window)


def _gib(memory: ServingMemory, kv_bytes: float) -> dict[str, float]:
    parts = {
        "weights": memory.weights_bytes / 2**30,
        "kv_cache": kv_bytes / 2**30,
        "workspace": memory.workspace_bytes / 2**30,
    }
    return {"peak": sum(parts.values()), **parts}


def _numbers(parts: dict[str, Any]) -> dict[str, float]:
    return {term: float(seconds) for term, seconds in parts.items()}
