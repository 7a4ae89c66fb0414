"""Attention of one step over the paged cache: all decoding sequences at once, then each prompt's chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from triaxial.kernels.operations import Kernels
from triaxial.model.decoder import Attend
from triaxial.model.spec import ModelSpec
from triaxial.serve.cache import PagedCache
from triaxial.serve.wire import StepArrays

Positions = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class _Masks:
    """What is added to the scores [sequences, 1, queries, keys], in layers without and with the sliding window."""

    full: Tensor
    windowed: Tensor | None

    def of(self, windowed: bool) -> Tensor:
        return self.windowed if windowed and self.windowed is not None else self.full


class _Part(Protocol):
    """Some rows of the step and what they attend to."""

    rows: slice

    def attend(self, cache: PagedCache, place: int, windowed: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows' q, k, v [tokens, heads or kv heads, dim], k and v cached already -> [tokens, heads, dim]."""


@dataclass
class _Beginning:
    """A prompt from its first token on: causal attention among its own rows."""

    rows: slice

    def attend(self, cache: PagedCache, place: int, windowed: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prompt_attention(q, k, v, cache.kernels)


@dataclass
class _Continued:
    """A prompt's next chunk, by the kernel for that; `blocks` hold so many tokens of it by now."""

    rows: slice
    blocks: Tensor
    tokens: int
    window: int | None

    def attend(self, cache: PagedCache, place: int, windowed: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert cache.kernels is not None
        k, v = (x[0, :, : self.tokens].transpose(0, 1) for x in cache.gather(place, self.blocks, 1))
        return cache.kernels.prompt(q, k, v, self.window if windowed else None)


@dataclass
class _Gathered:
    """Sequences whose blocks lie anywhere, `len(blocks) / sequences` of each, with equally many rows each."""

    rows: slice
    sequences: int
    blocks: Tensor
    masks: _Masks

    def attend(self, cache: PagedCache, place: int, windowed: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = cache.gather(place, self.blocks, self.sequences)
        q = q.view(self.sequences, -1, *q.shape[1:]).transpose(1, 2)
        return attention(q, k, v, self.masks.of(windowed), causal=False).transpose(1, 2).flatten(0, 1)


@dataclass
class _AtHome:
    """Decoding sequences whose keys lie in order at their slots' homes: attention reads them where they are.

    Slots in between that are not in the step are computed too, for nothing.
    """

    rows: slice
    slots: slice
    own: Tensor | None
    """Each row's slot, from the first of `slots` on; None where that is its own number."""
    keys: int
    masks: _Masks

    def attend(self, cache: PagedCache, place: int, windowed: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = cache.at_home(place, self.slots, self.keys)
        if self.own is None:
            return attention(q[:, :, None], k, v, self.masks.of(windowed), causal=False)[:, :, 0]
        spread = q.new_zeros(len(k), *q.shape[1:]).index_copy_(0, self.own, q)
        return attention(spread[:, :, None], k, v, self.masks.of(windowed), causal=False)[:, :, 0].index_select(
            0, self.own
        )


@dataclass
class _Decoded:
    """Decoding sequences whose blocks lie anywhere, by the kernel that reads them there."""

    rows: slice
    blocks: Tensor
    beginning: Tensor
    """Of each sequence: zeros."""
    windowed: Tensor
    """The first key that each sees within the sliding window."""
    stop: Tensor

    def attend(self, cache: PagedCache, place: int, windowed: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cache.decode(place, q, self.blocks, self.windowed if windowed else self.beginning, self.stop)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, kernels: Kernels | None) -> Tensor:
    """Causal attention of q [tokens, heads, dim] over its own k, v [tokens, kv heads, dim] -> as q."""
    if kernels and kernels.can_prompt(q.shape[2]):
        return kernels.prompt(q, k, v, None)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attention(q, k, v, mask=None, causal=True)[0].transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """q [sequences, heads, queries, dim], k, v [sequences, kv heads, keys, dim]; causal only where these are as many."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class StepAttention:
    """Where the step's keys go and what its queries see."""

    def __init__(self, spec: ModelSpec, cache: PagedCache, step: StepArrays, like: Tensor) -> None:
        """`like` has the type and device of the activations."""
        self._spec, self._cache, self._like = spec, cache, like
        sequence = np.repeat(np.arange(len(step.counts)), step.counts)
        inside, size = row_positions(step) - step.base[sequence], cache.block_tokens
        self._places = self._tensor(step.tables[sequence, inside // size] * np.int64(size) + inside % size)
        self._parts = list(self._divide(step))

    def attend(self, layer: int, place: int) -> Attend:
        """Attention of `layer`, which has its cache at `place` on this rank."""
        windowed = self._spec.sliding_window is not None and layer >= self._spec.first_windowed_layer

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.squeeze(1), k.squeeze(1), v.squeeze(1)  # [tokens, heads, dim]
            cache = self._cache
            cache.write(place, self._places, k, v)
            if len(self._parts) == 1:
                return self._parts[0].attend(cache, place, windowed, q, k, v).unsqueeze(1)
            done = [p.attend(cache, place, windowed, q[p.rows], k[p.rows], v[p.rows]) for p in self._parts]
            return torch.cat(done).unsqueeze(1)

        return attend

    def _divide(self, step: StepArrays) -> Iterator[_Part]:
        """The leading entries of one token each go together; every other entry goes alone."""
        together = int(np.argmax(step.counts != 1)) if (step.counts != 1).any() else len(step.counts)
        if together:
            yield self._decoding(step, together)
        row = together
        for i in range(together, len(step.counts)):
            rows = slice(row, row + int(step.counts[i]))
            yield self._chunk(step, i, rows)
            row = rows.stop

    def _decoding(self, step: StepArrays, n: int) -> _Part:
        size, home = self._cache.block_tokens, self._cache.home
        last, base, slots = step.first[:n], step.base[:n], step.slots[:n]
        held = (last - base) // size + 1  # blocks of each
        width = int(held.max())
        tables, rows = step.tables[:n, :width], slice(0, n)
        if self._cache.can_decode:
            stop = last + 1 - base
            windowed = np.maximum(stop - (self._spec.sliding_window or np.inf), 0)
            return _Decoded(rows, *(self._tensor(x) for x in (tables, np.zeros_like(stop), windowed, stop)))
        low, high = int(slots.min()), int(slots.max()) + 1
        in_order = slots[:, None] * home + np.arange(width)
        at_home = (
            width <= home and not base.any() and ((tables == in_order) | (np.arange(width) >= held[:, None])).all()
        )
        if not at_home or high - low > 2 * n:
            keys = base[:, None] + np.arange(width * size)  # [n, keys]
            masks = self._masks(keys[:, None, None, :], last[:, None, None, None])
            return _Gathered(rows, n, self._tensor(tables.ravel()), masks)
        seen = np.zeros(high - low, np.int64)  # slots that are not in the step see their first key
        seen[slots - low] = last
        in_turn = len(seen) == n and bool((slots - low == np.arange(n)).all())
        masks = self._masks(np.arange(width * size), seen[:, None, None, None])
        return _AtHome(rows, slice(low, high), None if in_turn else self._tensor(slots - low), width * size, masks)

    def _chunk(self, step: StepArrays, i: int, rows: slice) -> _Part:
        size, base, first = self._cache.block_tokens, int(step.base[i]), int(step.first[i])
        last, window = first + rows.stop - rows.start - 1, self._spec.sliding_window
        if first == 0 and (window is None or window > last):
            return _Beginning(rows)
        blocks = step.tables[i, : (last - base) // size + 1]
        kernels = self._cache.kernels
        if kernels and kernels.can_prompt(self._spec.head_dim):
            return _Continued(rows, self._tensor(blocks), last + 1 - base, window)
        keys = base + np.arange(len(blocks) * size)
        masks = self._masks(keys, np.arange(first, last + 1)[:, None])
        return _Gathered(rows, 1, self._tensor(blocks), masks)

    def _masks(self, keys: Positions, queries: Positions) -> _Masks:
        """For keys and queries at these positions."""
        seen, window = keys <= queries, self._spec.sliding_window
        return _Masks(self._mask(seen), None if window is None else self._mask(seen & (keys > queries - window)))

    def _mask(self, seen: NDArray[np.bool_]) -> Tensor:
        hidden = torch.from_numpy(~seen).to(self._like.device)
        return self._like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._like.device)


def row_positions(step: StepArrays) -> Positions:
    """Position of every token of the step in its sequence [tokens]."""
    starts = np.cumsum(step.counts) - step.counts
    positions: Positions = np.arange(len(step.tokens)) + np.repeat(step.first - starts, step.counts)
    return positions
