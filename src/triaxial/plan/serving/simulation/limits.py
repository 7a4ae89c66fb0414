"""`Limits`: the sizes of one replica, as the engine has them."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 16
"""Tokens of one sequence that a block of the KV cache holds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of one replica. Where fewer tokens go into a step than sequences run, the oldest ones decode."""

    max_batch: int
    """Sequences that run at a time."""
    chunk_tokens: int
    """Tokens of a step."""
    kv_tokens: int
    """Tokens that the KV cache holds."""
    block_tokens: int = BLOCK_TOKENS
    window: int | None = None
    """Keys that the farthest-seeing layer sees: blocks behind it are given back. None: it sees all."""

    @property
    def kv_blocks(self) -> int:
        return self.kv_tokens // self.block_tokens

    @property
    def kv_room(self) -> int:
        """Tokens that one sequence can have of it."""
        return self.kv_blocks * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one sequence."""
        return -(-tokens // self.block_tokens)

    def blocks_behind(self, computed: int) -> int:
        """Blocks wholly behind the window of the token that follows so many."""
        return 0 if self.window is None else max(0, computed + 1 - self.window) // self.block_tokens
