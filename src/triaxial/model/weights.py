"""What each rank holds of every tensor, and how those values are made or read.

A local parameter is made of pieces, each a slice of one *global* tensor named as in Hugging Face checkpoints. This
one description serves initial values, safetensors, gradient norms and checkpoints, so no layout can disagree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from triaxial import BadInput
from triaxial.model.spec import ModelSpec, refuse_planned_only

Init = Literal["normal", "normal_residual", "ones", "zeros"]

VOCAB_MULTIPLE = 8
"""Rows of the vocabulary on each rank are padded to this: 16 bytes of bf16, what matrix units load at once."""

_INIT_ROWS = 1024
"""Rows drawn from one seed, so that a slice of a huge tensor costs little more than its own rows."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) along `dim` of the global tensor `name`."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    init: Init
    dim: int = 0
    start: int = 0
    stop: int = 0
    counted: bool = True
    """False on ranks that hold a replica of another rank's piece: norms count each element once."""
    summed_over: Literal["", "tp", "kv"] = ""
    """Tensor-parallel axis of the mesh over which this rank's gradient is only a part."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class LocalParameter:
    """One tensor of a block on one rank: pieces stacked along dimension 0, then `padding` zero rows."""

    name: str
    pieces: tuple[Piece, ...]
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].local_shape
        return (sum(p.local_shape[0] for p in self.pieces) + self.padding, *first[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices, not for norms and biases."""
        return len(self.pieces[0].shape) > 1


@dataclass(frozen=True)
class Slicer:
    """Cuts a model's tensors for one tensor-parallel rank."""

    spec: ModelSpec
    index: int = 0
    size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        refuse_planned_only(self.spec)

    @property
    def kv_heads(self) -> int:
        return max(1, self.spec.num_kv_heads // self.size)

    @property
    def vocab_rows(self) -> int:
        per_rank = -(-self.spec.vocab // self.size)
        return -(-per_rank // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def first_row(self) -> int:
        return self.index * self.vocab_rows

    def embedding(self) -> list[LocalParameter]:
        return [self._vocabulary("embedding", "model.embed_tokens.weight")]

    def head(self) -> list[LocalParameter]:
        """Without the output projection if it is tied: that is the embedding's parameter."""
        norm = self._whole("final_norm", "model.norm.weight", (self.spec.hidden,), "ones", self._sp)
        return [norm] if self.spec.tied_embeddings else [self._vocabulary("head", "lm_head.weight"), norm]

    def layer(self, index: int) -> list[LocalParameter]:
        spec, prefix = self.spec, f"model.layers.{index}."
        parameters = [
            self._qkv(prefix, "weight", "normal", (spec.hidden,)),
            self._columns("out", f"{prefix}self_attn.o_proj.weight", (spec.hidden, spec.num_heads * spec.head_dim)),
            self._gate_up(prefix, "weight", "normal", (spec.hidden,)),
            self._columns("down", f"{prefix}mlp.down_proj.weight", (spec.hidden, spec.ffn)),
        ]
        if spec.qkv_bias:
            parameters.append(self._qkv(prefix, "bias", "zeros", ()))
        if spec.out_bias:
            parameters.append(self._hidden("out_bias", f"{prefix}self_attn.o_proj.bias", "zeros"))
        if spec.mlp_bias:
            parameters.append(self._gate_up(prefix, "bias", "zeros", ()))
            parameters.append(self._hidden("down_bias", f"{prefix}mlp.down_proj.bias", "zeros"))
        parameters.append(self._hidden("attention_norm", f"{prefix}input_layernorm.weight", "ones"))
        parameters.append(self._hidden("mlp_norm", f"{prefix}post_attention_layernorm.weight", "ones"))
        if spec.qk_norm:  # one weight for all heads, of which each rank sees only its own
            for name in ("q_norm", "k_norm"):
                full = f"{prefix}self_attn.{name}.weight"
                parameters.append(self._whole(name, full, (spec.head_dim,), "ones", self._tp))
        return parameters

    @property
    def _tp(self) -> Literal["", "tp"]:
        return "tp" if self.size > 1 else ""

    @property
    def _sp(self) -> Literal["", "tp"]:
        return "tp" if self.sequence_parallel else ""

    def _hidden(self, name: str, full_name: str, init: Init) -> LocalParameter:
        """A vector that acts on activations between the cut operations: partial under sequence parallelism."""
        return self._whole(name, full_name, (self.spec.hidden,), init, self._sp)

    def _whole(
        self, name: str, full_name: str, shape: tuple[int, ...], init: Init, summed_over: Literal["", "tp"]
    ) -> LocalParameter:
        piece = Piece(full_name, shape, init, 0, 0, shape[0], counted=self.index == 0, summed_over=summed_over)
        return LocalParameter(name, (piece,))

    def _rows(self, full_name: str, rows: int, rest: tuple[int, ...], init: Init) -> Piece:
        step = rows // self.size
        return Piece(full_name, (rows, *rest), init, 0, self.index * step, (self.index + 1) * step)

    def _columns(self, name: str, full_name: str, shape: tuple[int, int]) -> LocalParameter:
        step = shape[1] // self.size
        piece = Piece(full_name, shape, "normal_residual", 1, self.index * step, (self.index + 1) * step)
        return LocalParameter(name, (piece,))

    def _qkv(self, prefix: str, kind: str, init: Init, rest: tuple[int, ...]) -> LocalParameter:
        spec = self.spec
        q = self._rows(f"{prefix}self_attn.q_proj.{kind}", spec.num_heads * spec.head_dim, rest, init)
        copies = max(1, self.size // spec.num_kv_heads)
        step = self.kv_heads * spec.head_dim
        start = self.index // copies * step
        shape = (spec.num_kv_heads * spec.head_dim, *rest)
        k, v = (
            Piece(
                f"{prefix}self_attn.{which}_proj.{kind}",
                shape,
                init,
                start=start,
                stop=start + step,
                counted=self.index % copies == 0,
                summed_over="kv" if copies > 1 else "",
            )
            for which in "kv"
        )
        return LocalParameter("qkv" if kind == "weight" else "qkv_bias", (q, k, v))

    def _gate_up(self, prefix: str, kind: str, init: Init, rest: tuple[int, ...]) -> LocalParameter:
        gate, up = (
            self._rows(f"{prefix}mlp.{which}_proj.{kind}", self.spec.ffn, rest, init) for which in ("gate", "up")
        )
        return LocalParameter("gate_up" if kind == "weight" else "gate_up_bias", (gate, up))

    def _vocabulary(self, name: str, full_name: str) -> LocalParameter:
        vocab, start = self.spec.vocab, min(self.first_row, self.spec.vocab)
        stop = min(vocab, start + self.vocab_rows)
        piece = Piece(full_name, (vocab, self.spec.hidden), "normal", 0, start, stop)
        return LocalParameter(name, (piece,), padding=self.vocab_rows - (stop - start))


def global_tensors(spec: ModelSpec) -> list[Piece]:
    """Every tensor of a model, whole, in the order in which the model uses them."""
    whole = Slicer(spec)
    layers = (parameter for index in range(spec.num_layers) for parameter in whole.layer(index))
    return [piece for parameter in (*whole.embedding(), *layers, *whole.head()) for piece in parameter.pieces]


Source = Callable[[Piece], Tensor]
"""Gives the values of a piece."""


def fill(parameter: LocalParameter, into: Tensor, source: Source) -> None:
    """Write a parameter's values into `into` (its local shape); padding rows become zero."""
    row = 0
    for piece in parameter.pieces:
        rows = piece.local_shape[0]
        into[row : row + rows].copy_(source(piece))
        row += rows
    into[row:].zero_()


def initial_values(spec: ModelSpec, seed: int) -> Source:
    """Random initial values, the same elements whatever the layout.

    Each run of rows of a global tensor has its own generator, keyed by seed, name and row. Matrices are normal
    with the model's standard deviation; those that write to the residual stream are narrowed by
    1/sqrt(2 * layers) (GPT-2, section 2.3).
    """

    def source(piece: Piece) -> Tensor:
        if piece.init in ("ones", "zeros"):
            return torch.full(piece.local_shape, float(piece.init == "ones"))
        std = spec.init_std / (math.sqrt(2 * spec.num_layers) if piece.init == "normal_residual" else 1)
        rows, cols = piece.shape
        first, last = (piece.start, piece.stop) if piece.dim == 0 else (0, rows)
        left, right = (0, cols) if piece.dim == 0 else (piece.start, piece.stop)
        drawn = [
            _draw(seed, piece.name, block, min(_INIT_ROWS, rows - block), cols)[
                max(0, first - block) : last - block, left:right
            ]
            for block in range(first // _INIT_ROWS * _INIT_ROWS, last, _INIT_ROWS)
        ]
        return torch.cat(drawn).mul_(std) if drawn else torch.empty(0, right - left)

    return source


def _draw(seed: int, name: str, block: int, rows: int, cols: int) -> Tensor:
    key = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.randn(rows, cols, generator=generator)


DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""torch's names of the types that weights may have in safetensors files."""


class SafetensorsFolder:
    """Tensors of a Hugging Face model folder, read slice by slice; nothing else of a file is loaded."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of = _read_index(index)
        elif (folder / "model.safetensors").is_file():
            self._file_of = {}
        else:
            raise BadInput(f"{folder} holds no model.safetensors (nor an index of several)")
        self._folder = folder
        self._open: dict[Path, Any] = {}

    def __call__(self, piece: Piece) -> Tensor:
        tensor = self._find(piece)
        part: Tensor = tensor[:, piece.start : piece.stop] if piece.dim else tensor[piece.start : piece.stop]
        return part

    def check(self, spec: ModelSpec) -> None:
        """Read the files' headers and nothing else.

        Raises:
            BadInput: a tensor of the model is missing or has another shape, or there is one that the model has not.
        """
        tensors = global_tensors(spec)
        for piece in tensors:
            self._find(piece)
        names = self._file_of or self._open[self._folder / "model.safetensors"].keys()
        ignored = {"lm_head.weight"} if spec.tied_embeddings else set()
        unknown = set(names) - {piece.name for piece in tensors} - ignored
        unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}  # old files store it
        if unknown:
            raise BadInput(f"{self._folder}: {min(unknown)} is no tensor of {spec.name}: use its own config.json")

    def dtype(self, spec: ModelSpec) -> str:
        """Type of the tensors, by torch's name for it: that of the first."""
        return DTYPES[self._find(global_tensors(spec)[0]).get_dtype()]

    def _find(self, piece: Piece) -> Any:
        """The tensor that the piece is a part of; reads its header."""
        path = self._folder / self._file_of.get(piece.name, "model.safetensors")
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            tensor = self._open[path].get_slice(piece.name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: cannot read {piece.name}: {error}") from None
        if tuple(tensor.get_shape()) != piece.shape:
            raise BadInput(f"{path}: {piece.name} is {tensor.get_shape()}, not {list(piece.shape)}")
        if tensor.get_dtype() not in DTYPES:
            raise BadInput(f"{path}: {piece.name} is {tensor.get_dtype()}, not one of {', '.join(DTYPES)}")
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor, from a `model.safetensors.index.json`."""
    try:
        return {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise BadInput(f"{path} is not an index of safetensors files") from None
