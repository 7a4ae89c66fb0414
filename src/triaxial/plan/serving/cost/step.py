"""`StepCost`: seconds of one step of an engine, for any mix of prompts and decoding sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.spec import Cluster
from triaxial.cluster.timings import ServerTimings
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout, check_layout
from triaxial.plan.serving.constants import SERVING, HostTimes, ServingConstants
from triaxial.plan.serving.cost.memory import ServingMemory, serving_memory
from triaxial.plan.serving.cost.probed import probed_engine, probed_host
from triaxial.plan.serving.cost.stage import Stage, build_stages
from triaxial.plan.serving.engine import VLLM, Engine
from triaxial.plan.serving.workload import Serving

Number = float | NDArray[np.float64]


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of one replica (tp x pp ranks; data-parallel replicas are independent).

    A step processes `prefill_tokens` new prompt tokens and one token of each of `decode_sequences`:
        prefill_context_pairs: over all prompt tokens of the step, the keys they see (a prompt of n tokens taken whole:
            n (n + 1) / 2; a piece of c tokens after s earlier ones: c s + c (c + 1) / 2).
        decode_context: tokens that the decoding sequences hold, in all.
        prefill_sequences: prompts that end in this step and so need logits.
    Arguments may be numbers or arrays.
    """

    memory: ServingMemory
    stages: tuple[Stage, ...]
    engine: Engine
    host: HostTimes
    uneven: float
    """`ServingConstants.uneven`."""

    @property
    def pipeline_ranks(self) -> int:
        """Batches that can be in flight: one for each stage."""
        return len(self.stages)

    @property
    def request_s(self) -> float:
        """What a request takes outside the engine: no step waits for it."""
        return self.host.request_s

    def seconds(
        self,
        prefill_tokens: Number,
        prefill_context_pairs: Number,
        decode_sequences: Number,
        decode_context: Number,
        prefill_sequences: Number = 0.0,
    ) -> Number:
        """From the start of a step to its tokens: through all stages of the pipeline."""
        args = (prefill_tokens, prefill_context_pairs, decode_sequences, decode_context, prefill_sequences)
        device: Number = sum(stage.seconds(*args) for stage in self.stages)
        return device + self._waits_for_host(device, decode_sequences, prefill_sequences)

    def interval_seconds(
        self,
        prefill_tokens: Number,
        prefill_context_pairs: Number,
        decode_sequences: Number,
        decode_context: Number,
        prefill_sequences: Number = 0.0,
    ) -> Number:
        """What the slowest stage takes: with a pipeline, the time until the next batch can follow."""
        args = (prefill_tokens, prefill_context_pairs, decode_sequences, decode_context, prefill_sequences)
        if len(self.stages) == 1:
            return self.seconds(*args)
        slowest: Number = self.stages[0].seconds(*args)
        for stage in self.stages[1:]:
            slowest = np.maximum(slowest, stage.seconds(*args))
        return slowest + self._waits_for_host(slowest, decode_sequences, prefill_sequences)

    def parts(
        self,
        prefill_tokens: Number,
        prefill_context_pairs: Number,
        decode_sequences: Number,
        decode_context: Number,
        prefill_sequences: Number = 0.0,
    ) -> dict[str, Number]:
        """`seconds` by term, adding up to it: weights, compute, kv, passes, launches, all_reduce, hops, sampling,
        host."""
        args = (prefill_tokens, prefill_context_pairs, decode_sequences, decode_context, prefill_sequences)
        found = [stage.parts(*args) for stage in self.stages]
        total: dict[str, Number] = {name: sum(parts[name] for parts in found) for name in found[0]}
        return {**total, "host": self._waits_for_host(sum(total.values()), decode_sequences, prefill_sequences)}

    def _waits_for_host(self, device: Number, decoding: Number, prompts: Number) -> Number:
        """Seconds that devices which work for so many wait for the host."""
        host = self.host.step_s + self.host.sequence_s * (decoding + prompts) + self.host.prompt_s * prompts
        return np.maximum(0.0, host - device) if self.engine.host_ahead else host


def step_cost(
    model: ModelSpec,
    cluster: Cluster,
    layout: Layout,
    work: Serving,
    engine: Engine = VLLM,
    constants: ServingConstants = SERVING,
    client: ServerTimings | None = None,
) -> StepCost:
    """Build the cost of a step once; evaluating it is then cheap.

    Args:
        client: what a client on the same machine takes of its processors.

    Raises:
        BadInput: a layout that the model cannot be cut into, or more ranks than the cluster has.
    """
    check_layout(layout, model, work.input_len)
    return StepCost(
        serving_memory(model, cluster, layout, work, engine),
        build_stages(model, cluster, layout, work, engine, constants),
        engine,
        _host_times(cluster, layout, engine, constants, client),
        uneven=0.0 if probed_engine(cluster.device, engine) else constants.uneven,
    )


def _host_times(
    cluster: Cluster, layout: Layout, engine: Engine, constants: ServingConstants, client: ServerTimings | None
) -> HostTimes:
    probed = probed_engine(cluster.device, engine)
    if probed is not None:
        return probed_host(probed, engine, client, crowded=layout.world_size >= cluster.num_gpus)
    host = constants.hosts[engine.host]
    return host if engine.over_http else replace(host, request_s=0.0)
