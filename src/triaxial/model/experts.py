"""Parts of a model that Triaxial plans but does not run: mixtures of experts and latent attention."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from triaxial.model.config import Frozen


class Experts(Frozen):
    """A mixture of experts in place of the MLP (arXiv 2101.03961), with shared experts (arXiv 2401.06066)."""

    count: PositiveInt
    per_token: PositiveInt
    """Routed experts that each token visits."""
    ffn: PositiveInt
    """Width of one expert, routed or shared."""
    shared: NonNegativeInt = 0
    """Experts that every token visits besides."""
    first_dense_layers: NonNegativeInt = 0
    """Layers at the front that have an ordinary MLP of width `ModelSpec.ffn`."""


class LatentAttention(Frozen):
    """Multi-head latent attention: queries, keys and values through low-rank projections (arXiv 2405.04434)."""

    query_rank: PositiveInt | None
    """None: queries are projected at once."""
    kv_rank: PositiveInt
    nope_dim: PositiveInt
    """Query and key elements of a head without rotary position."""
    rope_dim: PositiveInt
    """Those with rotary position; their keys are shared by all heads."""
    value_dim: PositiveInt

    def parameters(self, hidden: int, heads: int) -> int:
        """Parameters of one layer's projections."""
        query = heads * (self.nope_dim + self.rope_dim)
        into = hidden * query if self.query_rank is None else self.query_rank * (hidden + query)
        latent = hidden * (self.kv_rank + self.rope_dim) + self.kv_rank * heads * (self.nope_dim + self.value_dim)
        return into + latent + heads * self.value_dim * hidden
