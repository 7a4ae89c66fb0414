"""Continuous batching: which tokens of which sequences make up the next step. Pure Python, no torch.

The rules, in the order in which a step is put together (`Scheduler.next_step`):

1. A step holds at most `step_tokens` tokens and `max_batch` sequences run at a time. As many steps are in flight as
   the pipeline has stages; a sequence whose next token is still on its way is left out.
2. Decode first: every running sequence whose last token is known gives one token, oldest arrival first. With p stages
   a step takes at most ceil(n / p) of the n decoding sequences, so that p steps share them.
3. Then prompts, oldest arrival first, each as much of the rest of it as the step has room for (chunked prefill). Those
   begun come before those waiting, because they arrived earlier. The next prompt is begun only if the one before it is
   in the step to its end, if fewer than `max_batch` sequences run, and if all of its tokens fit into the free blocks.
4. Blocks of `block_tokens` tokens are taken for the tokens of this step alone. If a decoding sequence needs a block and
   none is free, the youngest running sequence is preempted: its blocks are free at once, it waits again at its old
   place (by arrival), and later computes its prompt and the tokens it had already given again, as one prompt. Chunks
   of prompts preempt nobody: they take the blocks that are left, and wait.
5. Blocks that lie wholly outside the sliding window of every layer are given back as the window moves on.

Ranks run steps in the order in which they are sent. That is why blocks and slots can be given to another sequence
while a step of their last owner is still in flight.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from triaxial.serve.blocks import BlockPool
from triaxial.serve.request import Request
from triaxial.serve.wire import Entry, SamplerState, Step


@dataclass(eq=False)
class Running:
    """One request on its way: its tokens, and how many of them have been sent to be computed."""

    request: Request
    seed: int
    tokens: list[int]
    """The prompt, then what has been chosen."""
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    dropped: int = 0
    """Blocks at the front that were given back because no window reaches them."""
    slot: int | None = None
    """Its row in the sampler's tables while it runs; None while it waits."""
    sampling: bool = False
    """A token of it is on its way."""
    life: int = 0
    """Times it was begun; answers to an earlier life are void."""

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        return self.computed >= len(self.request.prompt) and self.left <= 1

    def wants_scores(self, first: int) -> bool:
        """Whether log-probabilities of prompt tokens after position `first` are asked for."""
        return self.request.sampling.prompt_logprobs is not None and first < len(self.request.prompt) - 1

    @property
    def given(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Part:
    """One sequence's part of a step in flight."""

    sequence: Running
    life: int
    first: int
    """Position of the first of its tokens."""
    samples: bool
    """The answer holds its next token."""

    @property
    def void(self) -> bool:
        """The sequence has ended, or was preempted, since the step was sent."""
        return self.sequence.slot is None or self.sequence.life != self.life


@dataclass(frozen=True)
class Limits:
    """Sizes of one replica; see the module's text."""

    stages: int
    max_batch: int
    step_tokens: int
    window: int | None = None
    """Keys that the farthest-seeing layer sees; None: all of them."""


class Scheduler:
    """Waiting and running sequences of one replica and their blocks."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.preemptions = 0
        self._sequences: list[Running] = []  # by arrival, waiting and running
        self._slots = list(range(limits.max_batch))  # a heap: low slots are neighbours
        self._in_flight: dict[int, list[Part]] = {}
        self._steps = 0

    @property
    def running(self) -> int:
        return self.limits.max_batch - len(self._slots)

    @property
    def waiting(self) -> int:
        return len(self._sequences) - self.running

    def add(self, request: Request, seed: int) -> Running:
        sequence = Running(request, seed, list(request.prompt))
        self._sequences.append(sequence)
        return sequence

    def remove(self, sequence: Running) -> None:
        """It is done, or nobody wants it any more: its blocks are free at once."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
            self._release(sequence)

    def next_step(self) -> Step | None:
        """The step to send now; None if all stages are busy or nothing is ready."""
        if len(self._in_flight) >= self.limits.stages:
            return None
        parts = self._decoding()
        self._add_prompts(parts, self.limits.step_tokens - len(parts))
        return self._make_step(parts) if parts else None

    def complete(self, step: int) -> list[Part]:
        """The step has come back; its parts, in the order of its entries."""
        parts = self._in_flight.pop(step)
        for part in parts:
            if part.samples and not part.void:
                part.sequence.sampling = False
        return parts

    def _decoding(self) -> dict[Running, int]:
        """Sequences of this step that give their last token, with 1 each."""
        decoding = [s for s in self._sequences if s.slot is not None and s.decodes]
        share = min(-(-len(decoding) // self.limits.stages), self.limits.step_tokens)
        parts: dict[Running, int] = {}
        for sequence in [s for s in decoding if not s.sampling][:share]:
            if sequence.slot is None:  # preempted a moment ago
                continue
            self._drop_unseen(sequence)
            while self._missing(sequence, 1) > self.pool.free and sequence.slot is not None:
                victim = self._youngest()
                parts.pop(victim, None)
                self._preempt(victim)
            if sequence.slot is not None:
                self._extend(sequence, 1)
                parts[sequence] = 1
        return parts

    def _add_prompts(self, parts: dict[Running, int], room: int) -> None:
        for sequence in self._prompts():
            if room == 0 or (sequence.slot is None and not self._begin(sequence)):
                return
            self._drop_unseen(sequence)
            tokens = min(room, sequence.left, self._room_in_blocks(sequence))
            if tokens == 0:
                return
            self._extend(sequence, tokens)
            parts[sequence] = tokens
            room -= tokens
            if tokens < sequence.left:
                return

    def _prompts(self) -> Iterator[Running]:
        return iter([s for s in self._sequences if not s.sampling and not (s.slot is not None and s.decodes)])

    def _begin(self, sequence: Running) -> bool:
        if not self._slots or self.pool.blocks_for(len(sequence.tokens)) > self.pool.free:
            return False
        sequence.slot = heapq.heappop(self._slots)
        sequence.life += 1
        return True

    def _make_step(self, parts: dict[Running, int]) -> Step:
        entries, states, sent = [], [], []
        for sequence, tokens in parts.items():
            assert sequence.slot is not None
            if sequence.computed == 0:
                states.append(SamplerState.of(sequence.slot, sequence.request, sequence.seed, sequence.tokens))
            last = tokens == sequence.left
            first = sequence.computed
            sequence.computed += tokens
            sequence.sampling = last
            sent.append(Part(sequence, sequence.life, first, last))
            entries.append(
                Entry(
                    slot=sequence.slot,
                    first=first,
                    tokens=sequence.tokens[first : first + tokens],
                    sample=last,
                    score=sequence.wants_scores(first),
                    base=sequence.dropped * self.pool.block_tokens,
                    blocks=list(sequence.blocks),
                )
            )
        self._steps += 1
        self._in_flight[self._steps] = sent
        return Step(self._steps, tuple(entries), tuple(states))

    # Blocks

    def _missing(self, sequence: Running, tokens: int) -> int:
        """Blocks that so many more tokens need."""
        held = sequence.dropped + len(sequence.blocks)
        return self.pool.blocks_for(sequence.computed + tokens) - held

    def _room_in_blocks(self, sequence: Running) -> int:
        held = sequence.dropped + len(sequence.blocks) + self.pool.free
        return held * self.pool.block_tokens - sequence.computed

    def _extend(self, sequence: Running, tokens: int) -> None:
        assert sequence.slot is not None
        held = sequence.dropped + len(sequence.blocks)
        sequence.blocks += self.pool.take(sequence.slot, held, self._missing(sequence, tokens))

    def _drop_unseen(self, sequence: Running) -> None:
        """Give back blocks that the next token, which sees its own key too, and all later ones do not see."""
        if self.limits.window is None:
            return
        unseen = max(0, sequence.computed + 1 - self.limits.window) // self.pool.block_tokens - sequence.dropped
        if unseen > 0:
            self.pool.give_back(sequence.blocks[:unseen])
            del sequence.blocks[:unseen]
            sequence.dropped += unseen

    def _youngest(self) -> Running:
        return next(s for s in reversed(self._sequences) if s.slot is not None)

    def _preempt(self, sequence: Running) -> None:
        self.preemptions += 1
        self._release(sequence)

    def _release(self, sequence: Running) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks, sequence.dropped, sequence.computed, sequence.sampling = [], 0, 0, False
        if sequence.slot is not None:
            heapq.heappush(self._slots, sequence.slot)
            sequence.slot = None
