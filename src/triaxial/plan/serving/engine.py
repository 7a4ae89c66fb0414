"""`Engine`: what a serving program does that no layout says. Facts to look up, not numbers to fit."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Facts about a serving program. The defaults describe a current engine with continuous batching."""

    name: str
    host: str
    """Whose host times it has (`ServingConstants.hosts`)."""
    over_http: bool = True
    """Requests come to it through its server; False calls it directly."""
    continuous: bool = True
    """Requests join and leave a running batch; False decodes one batch to its end before the next."""
    chunked_prefill: bool = True
    """A step mixes decoding with pieces of prompts; False takes whole prompts only."""
    reserves_outputs: bool = False
    """A request is admitted only when its whole output will fit; False admits early and preempts."""
    spare_slots: int = 0
    """Of the sequences that may run at a time, those that never do."""
    memory_share: float = 0.9
    """Share of a device's memory that the engine fills."""
    direct_all_reduce: bool = True
    """Small all-reduces by kernels that read the peers' memory over NVLink; False leaves all to NCCL."""
    fused_all_reduce: bool = False
    """The residual and the norm behind an all-reduce run in its kernel."""
    casts_apart: bool = False
    """Inputs of products in 8 bits are cast by kernels of their own, not by those that made them."""
    grouped_heads: tuple[int, ...] | None = None
    """Query heads per kv head for which decoding reads keys and values once; for other groups every query head reads
    them again, from the cache. None: any group."""
    groups_apart: tuple[str, ...] = ()
    """Kinds of devices (`constants.kind_of`) on which no group does so in a step that prompts are in too."""
    fused_attention: bool = True
    """Prompts go through one attention kernel; False writes all scores to memory."""
    batches_decoding: bool = True
    """Sequences decode in one product; False reads the weights once for each of them."""
    host_ahead: bool = False
    """The host readies a step while the devices work on the one before."""
    graphs: bool = True
    """Steps are replayed as captured graphs; False issues kernel by kernel."""
    pipeline_tokens: int | None = None
    """Tokens of a pipeline's micro-batch: batches are halved to get below. None: one part a stage."""

    def pipeline_parts(self, sequences: int, tokens_each: int, stages: int) -> int:
        """Micro-batches into which a pipeline of so many stages takes a batch."""
        if stages == 1:
            return 1
        if self.pipeline_tokens is None:
            return min(stages, sequences)
        part = sequences // stages if sequences % stages == 0 else sequences
        while part * tokens_each > self.pipeline_tokens and part % 2 == 0:
            part //= 2
        return sequences // part


OURS = Engine(name="triaxial", host="triaxial", graphs=False, direct_all_reduce=False)
"""Triaxial's own engine behind its server."""

OURS_CALLED = replace(OURS, over_http=False)
"""As the benchmarks call it."""

VLLM_0_6 = Engine(name="vllm-0.6", host="vllm", casts_apart=True, groups_apart=("volta", "ampere", "gddr"))
"""vLLM from 0.6: chunked prefill, captured graphs, `gpu_memory_utilization` 0.9 (its "Engine Arguments"), its own
all-reduce kernels (its pull request 2192). It casts to fp8 before every product (`scaled_fp8_quant` of its fp8 linear
layers); later versions fuse casts, norms and all-reduces (its "Fusion torch.compile passes"). Where it has neither
FlashAttention-3 (Hopper) nor FlashInfer's kernels (Blackwell with HBM), FlashAttention-2 takes a step's prompts and
decoding sequences in one call, and brings a group's query heads together only where all sequences have one query (its
`seqlenq_ngroups_swapped`, flash_api.cpp)."""

VLLM = replace(VLLM_0_6, name="vllm", host_ahead=True)
"""From 0.14: asynchronous scheduling by default (its pull request 31998)."""

SGLANG = replace(VLLM, name="sglang", groups_apart=())

TENSORRT_LLM = Engine(
    name="tensorrt-llm", host="tensorrt-llm", chunked_prefill=False, reserves_outputs=True, fused_all_reduce=True
)
"""TensorRT-LLM from 1.0 with its defaults: whole prompts, GUARANTEED_NO_EVICT (its "Useful Runtime Options"), norms in
its all-reduces (its `AllReduceFusionOp.RESIDUAL_RMS_NORM`)."""

TENSORRT_LLM_1_0 = replace(TENSORRT_LLM, name="tensorrt-llm-1.0", spare_slots=1)
"""Its first release candidates under a limit of sequences: the published first tokens grow by one generation over the
number of clients, which is one client that waits for another's answer."""

TENSORRT_LLM_0_9 = replace(
    TENSORRT_LLM,
    name="tensorrt-llm-0.9",
    host="tensorrt-llm-static",
    continuous=False,
    fused_all_reduce=False,
    graphs=False,
    grouped_heads=(1, 8),
)
"""Its static batches of 2024. Which groups its XQA kernel took is read off the published rows: those of Llama-2-70B, with
8 query heads a kv head, but not those of Falcon-180B (29) and Mistral-7B (4)."""

TENSORRT_LLM_0_5 = replace(TENSORRT_LLM_0_9, name="tensorrt-llm-0.5", grouped_heads=(1,))
"""Of 2023: no group's, as the same rows show."""

FASTER_TRANSFORMER = Engine(
    name="fastertransformer",
    host="fastertransformer",
    continuous=False,
    chunked_prefill=False,
    direct_all_reduce=False,
    fused_attention=False,
    graphs=False,
    pipeline_tokens=1024,
)
"""Micro-batches: `getLocalBatchSize` of its nccl_utils.cc."""

MEGATRON = replace(
    FASTER_TRANSFORMER, name="megatron-lm", host="megatron-lm", pipeline_tokens=None, batches_decoding=False
)
"""Megatron-LM's text generation of 2022: eager PyTorch. From 4 sequences on, its published steps grow by the time of
one read of the weights for every sequence."""

SERVERS: dict[str, Engine] = {engine.name: engine for engine in (VLLM, SGLANG, TENSORRT_LLM, OURS)}
"""Engines that one would deploy today."""

ENGINES: dict[str, Engine] = {
    "triaxial": OURS,
    **{f"vllm 0.{minor}": VLLM for minor in range(14, 40)},
    "vllm": VLLM_0_6,
    "sglang": SGLANG,
    "trtllm 1.0": TENSORRT_LLM_1_0,
    "trtllm": TENSORRT_LLM,
    "tensorrt-llm 0.9": TENSORRT_LLM_0_9,
    "tensorrt-llm 0.8": TENSORRT_LLM_0_9,
    "tensorrt-llm 0.6": TENSORRT_LLM_0_5,
    "tensorrt-llm 0.5": TENSORRT_LLM_0_5,
    "tensorrt-llm": TENSORRT_LLM,
    "fastertransformer": FASTER_TRANSFORMER,
    "nemo": FASTER_TRANSFORMER,
    "megatron": MEGATRON,
}
"""By how sources name them and their version: the first that a name begins with."""
