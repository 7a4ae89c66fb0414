"""`Engine`: one replica. Requests in, chunks of tokens out; the ranks behind it decode what the scheduler orders."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from triaxial import BadInput
from triaxial.serve.batching import Limits, Running, Scheduler
from triaxial.serve.blocks import BlockPool
from triaxial.serve.ranks import Ranks
from triaxial.serve.request import Chunk, EngineFailed, EngineStats, FinishReason, Request, TokenLogprob
from triaxial.serve.settings import BLOCK_TOKENS, EngineSettings, end_tokens
from triaxial.serve.wire import encode_step

_FREE_PART = 0.5
"""Of free memory that the cache takes if nothing else is asked for: the rest is for activations and for others."""


@dataclass(eq=False)
class _Stream:
    """What one request's consumer is still to be given."""

    chunks: asyncio.Queue[Chunk | EngineFailed] = field(default_factory=asyncio.Queue)
    _scores: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt, collected until the first token is out."""
    _scores_given: bool = False

    def add_scores(self, first: int, scores: list[TokenLogprob]) -> None:
        """Those of the tokens after position `first`; what a preempted sequence computes again is known already."""
        if not self._scores_given:
            self._scores += scores[len(self._scores) - first :]

    def take_scores(self) -> tuple[TokenLogprob, ...]:
        """All of them, once."""
        taken = () if self._scores_given else tuple(self._scores)
        self._scores_given, self._scores = True, []
        return taken


class Engine:
    """One replica: owns its tp * pp rank processes and schedules for them. Use it inside one asyncio loop."""

    def __init__(self, settings: EngineSettings) -> None:
        """Raises BadInput for a model or layout that cannot be decoded."""
        self.settings = settings
        self.spec = settings.check()
        self.max_model_len = settings.model_len(self.spec)
        self.ends = end_tokens(settings.model)
        self._streams: dict[Running, _Stream] = {}
        self._sent: dict[int, float] = {}  # step: when
        self._ranks: Ranks | None = None
        self._scheduler: Scheduler | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pids(self) -> list[int]:
        return self._ranks.pids if self._ranks else []

    async def start(self) -> None:
        """Start the ranks and size the cache; ready when it returns.

        Raises:
            EngineFailed: a rank failed to start; names rank and cause.
            BadInput: not even one sequence fits into the memory that is free.
        """
        self._ranks = Ranks(self.settings)
        try:
            await self._ranks.start(lambda: min(self._sent.values(), default=None))
            blocks = self._num_blocks(await self._ranks.one_from_each())
            pool = BlockPool(blocks, BLOCK_TOKENS, self.settings.max_batch)
            self._ranks.send(json.dumps({"blocks": blocks, "home": pool.home}).encode())
            await self._ranks.one_from_each()
        except BaseException:
            await self._ranks.stop()
            raise
        layout, seen = self.settings.parsed_layout, self.spec.sliding_window
        everything_windowed = seen is not None and self.spec.first_windowed_layer == 0
        limits = Limits(
            layout.pp, self.settings.max_batch, self.settings.step_tokens, seen if everything_windowed else None
        )
        self._scheduler = Scheduler(pool, limits)
        self._task = asyncio.create_task(self._answers())

    def _num_blocks(self, ranks: list[dict[str, Any]]) -> int:
        usable = -(-self.max_model_len // BLOCK_TOKENS) * self.settings.max_batch
        budgets = [
            self.settings.kv_memory or int(rank["free"] * _FREE_PART * self.settings.memory_share) for rank in ranks
        ]
        # a stage may hold the head alone, and so no keys
        limits = [b // r["block_bytes"] for b, r in zip(budgets, ranks, strict=True) if r["block_bytes"]]
        blocks: int = min(usable, *limits)
        if blocks < 1:
            raise BadInput(
                f"the KV cache has no room for {BLOCK_TOKENS} tokens of {self.spec.name}: free memory, or use more ranks"
            )
        held = max(rank["block_bytes"] for rank in ranks) * blocks
        print(
            f"KV cache: {blocks} blocks of {BLOCK_TOKENS} tokens, {held / 2**20:,.0f} MiB a rank "
            f"of {min(rank['free'] for rank in ranks) / 2**20:,.0f} MiB free",
            file=sys.stderr,
        )
        return blocks

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Chunks of one request until one has a finish reason; closing the iterator frees its blocks at once.

        Raises:
            BadInput: a prompt that is empty, too long or not of this vocabulary.
            EngineFailed: the replica was lost; names rank and cause.
        """
        if self._ranks is None or self._scheduler is None:
            raise EngineFailed("the engine is not running")
        self.check(request)
        if self._ranks.failed.done():
            raise EngineFailed(self._ranks.failed.result())
        seed = request.sampling.seed
        sequence = self._scheduler.add(request, secrets.randbits(64) if seed is None else seed % (1 << 64))
        stream = self._streams[sequence] = _Stream()
        try:
            self._pump()
            while True:
                chunk = await stream.chunks.get()
                if isinstance(chunk, EngineFailed):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._end(sequence)

    def check(self, request: Request) -> None:
        """Refuse what this engine can never answer.

        Raises:
            BadInput: names the limit.
        """
        prompt, s = request.prompt, request.sampling
        if not prompt:
            raise BadInput("the prompt is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < self.spec.vocab:
            raise BadInput(f"prompt token ids must be 0 to {self.spec.vocab - 1}")
        if len(prompt) >= self.max_model_len:
            raise BadInput(
                f"the prompt has {len(prompt)} tokens, but this model takes {self.max_model_len} with at least one to come"
            )
        if any(not 0 <= token < self.spec.vocab for token in s.logit_bias):
            raise BadInput(f"logit_bias names token ids beyond 0 to {self.spec.vocab - 1}")
        if s.max_tokens < 1:
            raise BadInput("max_tokens must be at least 1")
        room = self._scheduler.pool.total * BLOCK_TOKENS if self._scheduler else self.max_model_len
        if min(len(prompt) + s.max_tokens, self.max_model_len) > room:
            raise BadInput(f"prompt and max_tokens are more than the {room} tokens that the KV cache holds")

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        if scheduler is None:
            return EngineStats(0, 0, 0, 0, 0)
        pool = scheduler.pool
        return EngineStats(scheduler.running, scheduler.waiting, pool.used, pool.total, scheduler.preemptions)

    async def stop(self) -> None:
        """End the ranks; requests that are still open end with EngineFailed."""
        if self._ranks is None:
            return
        await self._ranks.stop()
        if self._task is not None:
            await self._task

    async def wait_failed(self) -> str:
        """Return the cause once the replica is lost: a rank died, hung or failed."""
        assert self._ranks is not None
        return await asyncio.shield(self._ranks.failed)

    # Steps

    def _pump(self) -> None:
        """Send steps until every stage has one or nothing is ready."""
        assert self._scheduler is not None
        assert self._ranks is not None
        while not self._ranks.failed.done() and (step := self._scheduler.next_step()):
            self._sent[step.number] = time.monotonic()
            self._ranks.send(encode_step(step))

    async def _answers(self) -> None:
        """Hand out what comes back and keep the stages busy."""
        assert self._ranks is not None
        try:
            while True:
                _, answer = await self._ranks.next_message()
                self._take(answer)
                self._pump()
        except EngineFailed as failure:
            for stream in self._streams.values():
                stream.chunks.put_nowait(failure)

    def _take(self, answer: dict[str, Any]) -> None:
        assert self._scheduler is not None
        del self._sent[answer["step"]]
        tokens, logprobs, scores = iter(answer.get("tokens", ())), answer.get("logprobs", {}), answer.get("prompt", {})
        sampled = 0
        for i, part in enumerate(self._scheduler.complete(answer["step"])):
            stream = None if part.void else self._streams.get(part.sequence)
            if stream is not None and str(i) in scores:
                stream.add_scores(part.first, [_token_logprob(raw) for raw in scores[str(i)]])
            if part.samples:
                token, logprob = next(tokens), logprobs.get(str(sampled))
                sampled += 1
                if stream is not None:
                    self._give(part.sequence, stream, token, logprob)

    def _give(self, sequence: Running, stream: _Stream, token: int, logprob: Any) -> None:
        """Pass a token on, and let the sequence go if it was the last."""
        assert self._scheduler is not None
        sequence.tokens.append(token)
        reason = self._finish_reason(sequence, token)
        stream.chunks.put_nowait(
            Chunk(
                tokens=(token,),
                logprobs=() if logprob is None else (_token_logprob(logprob),),
                prompt_logprobs=stream.take_scores(),
                finish_reason=reason,
            )
        )
        if reason is not None:
            del self._streams[sequence]
            self._scheduler.remove(sequence)

    def _finish_reason(self, sequence: Running, token: int) -> FinishReason | None:
        s = sequence.request.sampling
        if token in s.stop_token_ids or (token in self.ends and not s.ignore_eos):
            return "stop"
        full = sequence.given >= s.max_tokens or len(sequence.tokens) >= self.max_model_len
        return "length" if full else None

    def _end(self, sequence: Running) -> None:
        """The consumer has gone."""
        if self._streams.pop(sequence, None) is not None and self._scheduler is not None:
            self._scheduler.remove(sequence)
            self._pump()


def _token_logprob(raw: Any) -> TokenLogprob:
    token, logprob, top = raw
    return TokenLogprob(token, logprob, tuple((id, value) for id, value in top))
