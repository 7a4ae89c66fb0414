"""`Practice`: what a training program does that no layout says (which kernels it has, what it hides behind what)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triaxial.cluster.hardware import Generation

AttentionKernel = Literal["unfused", "flash-1", "flash-2", "flash-3"]


EAGER_OPERATIONS_PER_KERNEL = 3.0
"""A GPT layer in eager PyTorch dispatches about 145 operations, views, transposes and saved tensors included, to run
forward and backward once: 49 of them are kernels."""


@dataclass(frozen=True, kw_only=True)
class Practice:
    """Facts about a training program. The defaults describe Triaxial's own runtime.

    They are facts to look up in a program's source, not numbers to fit: published measurements are predicted with
    the practice of the program that made them.
    """

    attention: AttentionKernel = "flash-2"
    """`unfused` writes the score matrix to memory; `flash-1` (arXiv 2205.14135), `flash-2` (2307.08691) and `flash-3`
    (2407.08608), whose rates cuDNN's kernels share, do not."""
    dropout: bool = False
    """Dropout on attention scores and on both residual branches, each with its saved mask."""
    fused_passes: bool = True
    """Chains of element-wise operations run as one kernel (hand-written, or by a compiler)."""
    fused_accumulation: bool = False
    """The weight-gradient product adds to the gradient buffer itself; False adds in a pass of its own."""
    fused_alike_accumulation: bool = True
    """It does so at least where both have the same type, which every library's product can."""
    pads_vocabulary: bool = True
    """The vocabulary is padded so that its rows start at multiples of 16 bytes on every rank."""
    operations_per_kernel: float = EAGER_OPERATIONS_PER_KERNEL
    """Operations that the host dispatches for each kernel that runs."""
    host_runs_ahead: bool = True
    """The host issues what follows a collective while that still runs; False where steps were put together from
    layers and collectives that were measured apart."""
    selective: Literal["attention", "half"] = "attention"
    """What selective recomputation runs again: the attention core (arXiv 2205.05198), or half of everything
    (every second layer or product)."""
    gradient_bytes: int = 4
    """Bytes per gradient element as accumulated over micro-batches and reduced over dp."""
    reduce_bytes: int = 4
    """Bytes per gradient element as sent over dp."""
    overlap_gradients: bool = True
    """The dp reduction of a layer runs while the backward pass goes on."""
    messages_per_layer: int = 1
    """Collectives into which the parameters, or gradients, of one layer are cut when they are sent layer by layer."""
    overlap_parameters: bool = True
    """The all-gather of sharded parameters runs ahead of the forward pass that needs them."""
    overlap_tensor: bool = False
    """Tensor-parallel collectives are split and hidden behind their matrix multiplications."""
    overlap_pipeline: bool = True
    """A rank computes while its output travels; False is a blocking exchange after each action."""
    staggered_steps: bool = False
    """A pipeline rank updates its parameters and goes on without waiting for the others, and rolls back if the
    global gradient norm says so (arXiv 2401.10241, section 4)."""


def attention_slowdown(kernel: AttentionKernel, generation: Generation) -> float:
    """Time of a fused attention over that of the best kernel for a generation of devices.

    FlashAttention-2 is 1.7 to 3.0 times as fast as FlashAttention and 1.3 to 2.5 times as fast as its Triton version
    (arXiv 2307.08691, section 4.1): 1.8 is their common middle. FlashAttention-3 is 1.5 to 2.0 times as fast as
    FlashAttention-2 on Hopper (arXiv 2407.08608, abstract), whose asynchronous matrix units the latter cannot use.
    """
    slowdown = 1.8 if kernel == "flash-1" else 1.0
    if kernel != "flash-3" and generation in ("hopper", "blackwell"):
        slowdown *= 1.75
    return slowdown


OURS = Practice()
"""What Triaxial's own runtime does."""
