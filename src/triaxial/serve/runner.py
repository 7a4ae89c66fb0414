"""`Runner`: one rank's part of a model and its cache, and what it does with a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from triaxial.kernels.operations import kernels_for
from triaxial.model.decoder import Block, Embedding, Head, Layer, build_rotation
from triaxial.model.spec import ModelSpec
from triaxial.model.weights import LocalParameter, SafetensorsFolder, Slicer, Source, fill, initial_values
from triaxial.parallel.mesh import Axis, Mesh, open_group
from triaxial.plan.pipeline.stages import stage_cut
from triaxial.serve.attention import StepAttention, row_positions
from triaxial.serve.cache import PagedCache, block_bytes
from triaxial.serve.operations import Inference, inference_rotation, pack
from triaxial.serve.settings import BLOCK_TOKENS, EngineSettings, weights_folder
from triaxial.serve.wire import StepArrays

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Runner:
    """The blocks of one stage, cut for one tensor-parallel rank."""

    def __init__(self, spec: ModelSpec, settings: EngineSettings, mesh: Mesh, timeout: timedelta) -> None:
        self.spec, self.mesh = spec, mesh
        self._like = torch.empty(0, dtype=DTYPES[settings.precision], device=mesh.device)
        self._slicer = Slicer(spec, mesh.tp.index, mesh.tp.size)
        self._kernels = kernels_for(self._like)
        self._ops = Inference(mesh.tp, self._kernels)
        folder = weights_folder(settings.model)
        source = SafetensorsFolder(folder) if folder else initial_values(spec, settings.seed)
        cut = settings.parsed_layout.cut or stage_cut(spec, 1, tuple(range(mesh.pp.size)))
        first, stop = list(pairwise(accumulate(cut, initial=0)))[mesh.pp.index]
        self._blocks = self._build(range(first, stop), source)
        self._layers = [block for block in self._blocks if isinstance(block, Layer)]
        self._link = StageLink(mesh.pp, timeout)
        self._cache: PagedCache | None = None

    @property
    def block_bytes(self) -> int:
        """Of one block of the cache on this rank."""
        spec = self.spec
        return block_bytes(len(self._layers), BLOCK_TOKENS, self._slicer.kv_heads, spec.head_dim, self._like.dtype)

    def open_cache(self, blocks: int, home: int) -> None:
        """Make the cache; see `blocks.BlockPool`."""
        heads = self._slicer.kv_heads, self.spec.head_dim
        layers = len(self._layers)
        self._cache = PagedCache(
            layers, blocks, BLOCK_TOKENS, *heads, home=home, like=self._like, kernels=self._kernels
        )

    @torch.inference_mode()
    def run(self, step: StepArrays) -> Tensor | None:
        """Logits [wanted rows, vocab] on every rank of the last stage (see `wanted_rows`); None before it."""
        assert self._cache is not None
        positions = self._tensor(row_positions(step))
        rotation = build_rotation(self.spec, positions, self._like.dtype)
        rotation = inference_rotation(rotation, self._kernels, self.spec.num_heads // self.mesh.tp.size)
        attention = StepAttention(self.spec, self._cache, step, self._like)
        x = self._link.receive(self._like.new_empty(len(positions), self.spec.hidden))
        place = 0
        for block in self._blocks:
            match block:
                case Embedding():
                    x = block(self._tensor(step.tokens))
                case Layer():
                    x = block(x, rotation, attention.attend(block.index, place))
                    place += 1
                case Head():
                    return self._logits(block, x, step)
        self._link.send(x)
        return None

    def _logits(self, head: Head, x: Tensor, step: StepArrays) -> Tensor:
        rows = self._tensor(wanted_rows(step))
        logits = head(x.index_select(0, rows))  # [rows, vocab/tp]
        parts = self.mesh.tp.all_gather(logits).view(self.mesh.tp.size, *logits.shape)
        return parts.transpose(0, 1).flatten(1)[:, : self.spec.vocab].float()

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._like.device)

    # Building

    def _build(self, indices: Sequence[int], source: Source) -> list[Block]:
        """Blocks of the model: 0 is the embedding, then the layers, then the head."""
        spec, slicer, ops = self.spec, self._slicer, self._ops
        embedding: dict[str, Tensor] = {}
        last = spec.num_layers + 1
        if 0 in indices or (spec.tied_embeddings and last in indices):
            embedding = self._load(slicer.embedding(), source)
        blocks: list[Block] = []
        for index in indices:
            if index == 0:
                blocks.append(Embedding(embedding, ops, slicer.first_row))
            elif index < last:
                parameters = _packed(self._load(slicer.layer(index - 1), source))
                blocks.append(Layer(parameters, ops, spec, index - 1, slicer.kv_heads))
            else:
                parameters = _packed(self._load(slicer.head(), source))
                if spec.tied_embeddings:
                    parameters["head"] = embedding["embedding"]  # looked up as well, so it stays as it is
                blocks.append(Head(parameters, ops, spec, slicer.first_row))
        return blocks

    def _load(self, parameters: Sequence[LocalParameter], source: Source) -> dict[str, Tensor]:
        tensors = {p.name: self._like.new_empty(p.shape) for p in parameters}
        for parameter in parameters:
            fill(parameter, tensors[parameter.name], source)
        return tensors


def _packed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: pack(tensor) if tensor.ndim == 2 else tensor for name, tensor in parameters.items()}


def wanted_rows(step: StepArrays) -> NDArray[np.int64]:
    """Rows of the step whose logits are used: the last of sequences to be sampled, all of prompts to be scored."""
    ends = np.cumsum(step.counts)
    wanted = np.zeros(len(step.tokens), bool)
    wanted[ends[step.sample] - 1] = True
    wanted |= np.repeat(step.score, step.counts)
    return np.flatnonzero(wanted)


class StageLink:
    """Activations from the stage before and to the stage after; a send never waits for its receiver."""

    def __init__(self, pp: Axis, timeout: timedelta) -> None:
        self._axis = pp
        here = pp.ranks[pp.index]
        groups = [open_group(pair, here, timeout) for pair in pairwise(pp.ranks)]
        self._before = groups[pp.index - 1] if pp.index > 0 else None
        self._after = groups[pp.index] if pp.index + 1 < pp.size else None
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def receive(self, into: Tensor) -> Tensor:
        """Fill `into` with what the stage before sent next; the first stage gets it back as it is."""
        if self._before is not None:
            with self._axis.naming(f"receiving from rank {self._axis.ranks[self._axis.index - 1]}"):
                self._before.recv([into], 0, 0).wait()
        return into

    def send(self, x: Tensor) -> None:
        if self._after is None:
            return
        with self._axis.naming(f"sending to rank {self._axis.ranks[self._axis.index + 1]}"):
            while self._sent and self._sent[0][0].is_completed():
                self._sent.popleft()[0].wait()
            self._sent.append((self._after.send([x], 1, 0), x))
