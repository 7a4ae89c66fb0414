"""What the programs behind published measurements do, as far as their sources say: facts, not fitted numbers."""

from __future__ import annotations

from dataclasses import replace

from triaxial.plan.cost.practice import OURS, Practice

MEGATRON_2022 = Practice(
    attention="unfused",
    dropout=True,
    fused_accumulation=True,
    overlap_gradients=False,
    overlap_parameters=False,
    overlap_pipeline=False,
)
"""Megatron-LM before 2023: fused softmax and bias-dropout kernels, fp32 gradient buffers, one blocking all-reduce
after the last micro-batch, scatter/gather transfers (arXiv 2104.04473, sections 4.1 and 4.2)."""

MEGATRON_2021 = replace(
    MEGATRON_2022, fused_accumulation=False, fused_alike_accumulation=False, gradient_bytes=2, reduce_bytes=2
)
"""Until 2021 weight gradients were added up in a pass of their own and, in fp16, stayed fp16 unless
`--accumulate-allreduce-grads-in-fp32` was given (its arguments.py and model/distributed.py; DeepSpeed's pipeline engine
under Megatron's layers does the same: arXiv 2201.11990, section 2)."""

MEGATRON_TORCH_DDP = replace(MEGATRON_2021, overlap_gradients=True)
"""Run with `--DDP-impl torch`, which reduces buckets while the backward pass goes on: the rows of table 1 of arXiv
2104.04473 without a pipeline (examples/sc21/run_table_1.sh)."""

ZERO_BUBBLE = replace(MEGATRON_2022, overlap_pipeline=True, staggered_steps=True)
"""The fork of Megatron-LM behind arXiv 2401.10241: asynchronous transfers, optimizer post-validation."""

VTRAIN_PROFILE = replace(
    MEGATRON_2022,
    fused_passes=False,
    fused_accumulation=True,
    gradient_bytes=2,
    reduce_bytes=2,
    pads_vocabulary=False,
    host_runs_ahead=False,
)
"""The one-layer model of vTrain's profiler (its src/model, commit f8dda84): eager fp16 PyTorch with fresh 16-bit
gradients, a vocabulary of 50,257 cut by tp without padding, one all-reduce at the end. Its single-node rows are sums
of such profiles (docs/measured/planner.md)."""

DEEPSPEED_ZERO_3 = replace(MEGATRON_2021, messages_per_layer=4)
"""DeepSpeed's ZeRO-3 of 2021 gathers parameter by parameter (four matrices a layer; smaller ones stay), in the way of
computation (arXiv 1910.02054; the baseline of arXiv 2104.04473, section 5.2)."""

MEGATRON_CORE = Practice(attention="flash-3", reduce_bytes=2, fused_accumulation=True, overlap_tensor=True)
"""NeMo and Megatron-Bridge recipes: cuDNN's fused attention, fused kernels, distributed optimizer with overlapped
reduce-scatter and all-gather, user-buffer overlap of tensor-parallel collectives, asynchronous transfers."""

LLM_FOUNDRY = Practice(
    attention="flash-1", fused_passes=False, fused_alike_accumulation=False, gradient_bytes=2, reduce_bytes=2
)
"""PyTorch FSDP with 16-bit parameters and reduction (mixed precision PURE), Triton FlashAttention, eager code."""

TORCHTITAN_EAGER = Practice(fused_passes=False, selective="half")
"""torchtitan: FSDP2 with fp32 reduction; selective recomputation of every second layer or product."""

TORCHTITAN_COMPILED = replace(TORCHTITAN_EAGER, fused_passes=True, operations_per_kernel=1.0)
"""Compiled layer by layer: the host calls kernels and little else."""

PADDLE = Practice(reduce_bytes=2, fused_passes=False, overlap_gradients=False, overlap_parameters=False)
"""PaddleNLP: sharding stage 2, FlashAttention."""

PRACTICES: dict[str, Practice] = {
    "sc21t1": MEGATRON_2021,
    "sc21t2": MEGATRON_2021,
    "mlmreadme": MEGATRON_2021,
    "mlm2020": MEGATRON_2021,
    "kor": MEGATRON_2022,
    "zb": ZERO_BUBBLE,
    "mtnlg": MEGATRON_2021,
    "neox": MEGATRON_2021,
    "vtm": MEGATRON_2021,
    "vts": VTRAIN_PROFILE,
    "llmf": LLM_FOUNDRY,
    "titan": TORCHTITAN_EAGER,
    "nemo2407": MEGATRON_CORE,
    "nemolong": MEGATRON_CORE,
    "mbridge25": MEGATRON_CORE,
    "mbridge26": MEGATRON_CORE,
    "dsv3": MEGATRON_CORE,
    "paddle": PADDLE,
}
"""By the first word of a row's id; any other row is predicted with Triaxial's own practice."""


def practice_of(source: str, notes: str, zero: int, pp: int) -> Practice:
    """The practice behind a published row.

    Args:
        source: prefix of the row's id, without its number.
        notes: the source's words about the row, which may name compilation and asynchronous tensor parallelism.
        zero: its ZeRO stage.
        pp: its pipeline stages.
    """
    practice = PRACTICES.get(source.partition("-")[0], OURS)
    words = notes.lower()
    if source == "titan" and "compile" in words:
        practice = TORCHTITAN_COMPILED
    if source == "sc21t1" and pp == 1:
        practice = MEGATRON_TORCH_DDP
    if source == "sc21t2" and zero == 3:
        practice = DEEPSPEED_ZERO_3
    if "async" in words:
        practice = replace(practice, overlap_tensor=True)
    return practice
