"""`Limits`: the sizes of one replica, as the engine has them."""

from __future__ import annotations

from dataclasses import dataclass

from triaxial import BadInput

BLOCK_TOKENS = 16
"""Tokens of one sequence that a block of the KV cache holds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of one replica.

    Raises:
        BadInput: more sequences than tokens in a step, so that not all could decode.
    """

    max_batch: int
    """Sequences that run at a time."""
    chunk_tokens: int
    """Tokens of a step."""
    kv_tokens: int
    """Tokens that the KV cache holds."""
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.max_batch > self.chunk_tokens:
            raise BadInput(
                f"max-batch {self.max_batch} is more than the {self.chunk_tokens} tokens of a step: "
                "lower it, or raise chunk-tokens"
            )

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
