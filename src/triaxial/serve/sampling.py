"""Choosing tokens: all sequences of a step at once, the same under every layout and in every batch.

The order is that of transformers: bias, penalties and bans on the logits, then temperature, top-k, top-p, min-p. The
token is drawn by the Gumbel-max trick with noise that is a function of seed, position and token: what a layout or a
batch changes in the last bits of the logits changes the token only where two candidates tie within those bits, unlike
a number that is looked up in cumulated probabilities, whose every boundary would move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triaxial.serve.wire import Ints, SamplerState, StepArrays

_FIRST_CANDIDATES = 1024
"""Likeliest tokens among which top-p is looked for before everything is sorted."""

_GREEDY = 1e-5
"""Temperatures up to here choose the likeliest token: dividing by less overflows."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ODD = 0x9E3779B1 - (1 << 32)
_MURMUR = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))

_DEFAULTS: dict[str, tuple[type, float]] = {
    "temperature": (np.float32, 1.0),
    "top_k": (np.int64, 0),
    "top_p": (np.float32, 1.0),
    "min_p": (np.float32, 0.0),
    "repetition_penalty": (np.float32, 1.0),
    "presence_penalty": (np.float32, 0.0),
    "frequency_penalty": (np.float32, 0.0),
    "min_tokens": (np.int64, 0),
}


@dataclass
class _Extra:
    """What only some sequences have: tables as wide as the vocabulary."""

    in_prompt: Tensor  # bool [vocab]
    counts: Tensor  # [vocab] times that each token was chosen


class Sampler:
    """Rows of parameters, one a slot; a slot's next owner overwrites them."""

    def __init__(self, slots: int, vocab: int, ends: frozenset[int], device: torch.device) -> None:
        self._vocab, self._ends, self._device = vocab, ends, device
        self._values: dict[str, NDArray[Any]] = {
            n: np.full(slots, value, kind) for n, (kind, value) in _DEFAULTS.items()
        }
        self._seeds, self._prompts = np.zeros(slots, np.uint64), np.zeros(slots, np.int64)
        self._states: dict[int, SamplerState] = {}
        self._extras: dict[int, _Extra] = {}
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}
        self._bans: dict[int, Tensor] = {}

    def learn(self, state: SamplerState) -> None:
        """A sequence begins, or begins again, in a slot."""
        slot, s = state.slot, state.sampling
        for name, column in self._values.items():
            column[slot] = getattr(s, name)
        self._seeds[slot], self._prompts[slot] = state.seed, state.prompt
        self._states[slot] = state
        for table in (self._extras, self._biases, self._bans):
            table.pop(slot, None)
        if s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0:
            self._extras[slot] = self._count(state)
        if s.logit_bias:
            ids = torch.tensor(list(s.logit_bias), device=self._device)
            self._biases[slot] = ids, torch.tensor(list(s.logit_bias.values()), device=self._device)
        if s.min_tokens:
            ends = set(s.stop_token_ids) | (set() if s.ignore_eos else self._ends)
            self._bans[slot] = torch.tensor(sorted(ends), dtype=torch.int64, device=self._device)

    def answer(self, logits: Tensor, step: StepArrays) -> dict[str, Any]:
        """What the front is told of a step, from the logits [wanted rows, vocab] of `runner.wanted_rows`."""
        rows, scored = _share_rows(step)
        which = np.flatnonzero(step.sample)
        slots, positions = step.slots[which], (step.first + step.counts)[which]
        answer: dict[str, Any] = {"step": step.number}
        if scored:
            answer["prompt"] = {str(i): self._score(logits[part], step, i) for i, part in scored.items()}
        if len(which):
            chosen_from = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]
            tokens = self._choose(chosen_from, slots, positions)
            answer["tokens"] = tokens
            asked = {i: n for i, slot in enumerate(slots) if (n := self._states[slot].sampling.logprobs) is not None}
            if asked:
                told = _logprobs(chosen_from[list(asked)], [tokens[i] for i in asked], list(asked.values()))
                answer["logprobs"] = {str(i): one for i, one in zip(asked, told, strict=True)}
        return answer

    def _score(self, logits: Tensor, step: StepArrays, entry: int) -> list[Any]:
        """Log-probabilities of the prompt's tokens after each of the entry's."""
        state, first = self._states[step.slots[entry]], int(step.first[entry])
        targets = state.tokens[first + 1 : min(first + len(logits) + 1, state.prompt)]
        top = state.sampling.prompt_logprobs or 0
        return _logprobs(logits[: len(targets)], list(targets), [top] * len(targets))

    def _choose(self, logits: Tensor, slots: Ints, positions: Ints) -> list[int]:
        logits = self._adjust(logits, slots, positions)
        temperature = self._values["temperature"][slots]
        tokens = logits.max(-1).indices  # on a CPU three times as fast as `argmax`
        drawn = np.flatnonzero(temperature > _GREEDY)
        if len(drawn):
            every = len(drawn) == len(slots)
            rows = logits if every else logits[self._on_device(drawn)]
            picked = self._draw(rows, slots[drawn], positions[drawn])
            tokens = picked if every else tokens.index_copy(0, self._on_device(drawn), picked)
        chosen: list[int] = tokens.tolist()
        for i, slot in enumerate(slots) if self._extras else ():
            if slot in self._extras:
                self._extras[slot].counts[chosen[i]] += 1
        return chosen

    def _adjust(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """Biases, penalties and bans; the caller's logits stay as they are."""
        special = [
            i for i, slot in enumerate(slots) if slot in self._biases or slot in self._extras or slot in self._bans
        ]
        if not special:
            return logits
        logits = logits.clone()
        for i in special:
            slot, row = int(slots[i]), logits[i]
            if slot in self._biases:
                row.index_add_(0, *self._biases[slot])
            if slot in self._extras:
                self._penalise(row, slot)
            if slot in self._bans and positions[i] - self._prompts[slot] < self._values["min_tokens"][slot]:
                row.index_fill_(0, self._bans[slot], -torch.inf)
        return logits

    def _penalise(self, row: Tensor, slot: int) -> None:
        """Repetition (arXiv 1909.05858, section 4.1) on prompt and output; presence and frequency on the output."""
        extra, s = self._extras[slot], self._states[slot].sampling
        repeated = extra.in_prompt | (extra.counts > 0)
        scaled = torch.where(row > 0, row / s.repetition_penalty, row * s.repetition_penalty)
        row.copy_(torch.where(repeated, scaled, row))
        row.sub_(extra.counts * s.frequency_penalty).sub_((extra.counts > 0) * s.presence_penalty)

    def _draw(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """One token of each row [n, vocab], by its own temperature and filters."""
        values = {name: column[slots] for name, column in self._values.items()}
        scaled = logits / self._on_device(values["temperature"])[:, None]
        if (values["top_k"] > 0).any() or (values["top_p"] < 1).any() or (values["min_p"] > 0).any():
            lowest = least_kept(scaled, *(self._on_device(values[name]) for name in ("top_k", "top_p", "min_p")))
            scaled = scaled.masked_fill(scaled < lowest, -torch.inf)
        return (scaled - self._noise(slots, positions).log_()).max(-1).indices

    def _noise(self, slots: Ints, positions: Ints) -> Tensor:
        keys = _mix(_mix(self._seeds[slots]) + positions.astype(np.uint64) * _GOLDEN)
        return exponentials(self._on_device(keys.view(np.int32).reshape(-1, 2)), self._vocab)

    def _count(self, state: SamplerState) -> _Extra:
        tokens = torch.tensor(state.tokens, dtype=torch.int64, device=self._device)
        prompt, given = tokens[: state.prompt], tokens[state.prompt :]
        in_prompt = torch.zeros(self._vocab, dtype=torch.bool, device=self._device)
        return _Extra(in_prompt.index_fill_(0, prompt, True), torch.bincount(given, minlength=self._vocab).float())

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def least_kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest logit [n, 1] of each row [n, vocab] that its filters keep; ties with it are kept too.

    top-p counts the probabilities of what top-k has left. 0, 1 and 0 keep everything.
    """
    vocab = scaled.shape[1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)[:, None]
    limits_all = bool(((top_k > 0) | (top_p >= 1)).all())
    candidates = int(torch.where(top_k > 0, k[:, 0], 1).max()) if limits_all else min(vocab, _FIRST_CANDIDATES)
    while True:
        likeliest = scaled.topk(min(vocab, max(candidates, int((k * (top_k > 0)[:, None]).max()))), dim=-1).values
        rank = torch.arange(likeliest.shape[1], device=scaled.device)
        left = likeliest.masked_fill(rank >= k, -torch.inf)
        total = torch.where((top_k > 0)[:, None], left.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True))
        mass = (left - total).exp()
        before = mass.cumsum(-1) - mass
        kept = ((before < top_p[:, None]) | (top_p >= 1)[:, None]) & (rank < k)
        kept[:, 0] = True
        if likeliest.shape[1] == vocab or not bool((kept[:, -1] & (top_k <= 0) & (top_p < 1)).any()):
            break
        candidates = vocab
    lowest = torch.where(kept, likeliest, torch.inf).amin(-1, keepdim=True)
    unfiltered = ((top_k <= 0) & (top_p >= 1))[:, None]
    lowest = torch.where(unfiltered, -torch.inf, lowest)
    return torch.maximum(lowest, likeliest[:, :1] + min_p[:, None].log())


def exponentials(keys: Tensor, count: int) -> Tensor:
    """Exponentially distributed numbers [n, count], a function of each row's key (int32 [n, 2]) and the column."""
    bits = torch.arange(count, dtype=torch.int32, device=keys.device).mul_(_ODD)[None] ^ keys[:, :1]
    bits = _scramble(_scramble(bits).add_(keys[:, 1:]))
    unit = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return unit.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def _scramble(bits: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (A. Appleby, public domain), in place."""
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= _MURMUR[0]
    bits ^= (bits >> 13).bitwise_and_(0x7FFFF)
    bits *= _MURMUR[1]
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's mixer (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _share_rows(step: StepArrays) -> tuple[NDArray[np.int64], dict[int, slice]]:
    """Of the wanted rows' logits: those that are sampled from, and those that score each entry's prompt."""
    sampled, scored, row = [], {}, 0
    if not step.score.any():
        return np.arange(int(step.sample.sum())), {}
    for i, count in enumerate(step.counts):
        if step.score[i]:
            scored[i] = slice(row, row + int(count))
            row += int(count)
        elif step.sample[i]:
            row += 1
        if step.sample[i]:
            sampled.append(row - 1)
    return np.array(sampled, np.int64), scored


def _logprobs(logits: Tensor, tokens: list[int], tops: list[int]) -> list[Any]:
    """For each row: its token's log-probability and its likeliest tokens with theirs."""
    if not tokens:
        return []
    scores = logits.log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None]).squeeze(1).tolist()
    best = scores.topk(min(max(tops), scores.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        (token, logprob, list(zip(ids[i][:top], values[i][:top], strict=True)))
        for i, (token, logprob, top) in enumerate(zip(tokens, own, tops, strict=True))
    ]
