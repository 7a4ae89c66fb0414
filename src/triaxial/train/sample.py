"""Text from a model that one rank holds whole: the plain loop, without a cache."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from triaxial.model.decoder import run_blocks
from triaxial.parallel.program import Program


def greedy(program: Program, prompt: NDArray[np.uint32], length: int, window: int) -> list[int]:
    """The `length` ids that follow `prompt` [n], each the most likely one given the last `window` ids."""
    blocks = [placed.block for placed in program.stages[0].blocks]
    ids = [int(i) for i in prompt]
    with torch.no_grad():
        for _ in range(length):
            context = torch.tensor(ids[-window:], device=program.mesh.device)[:, None]  # [seq, batch of 1]
            logits = run_blocks(blocks, context, program.spec)[-1, : program.spec.vocab]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
