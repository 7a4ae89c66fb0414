"""`Stage`: seconds of one pipeline stage, as tables over the tokens of a step and lines over what attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.collectives import collective_seconds, group_of
from triaxial.plan.layout import Layout
from triaxial.plan.pipeline.stages import stage_cut
from triaxial.plan.serving.constants import ServingConstants
from triaxial.plan.serving.cost.attention import AttentionCost, attention_cost
from triaxial.plan.serving.cost.operators import (
    embedding_operators,
    head_operators,
    layer_operators,
    with_fused_all_reduces,
)
from triaxial.plan.serving.cost.pricing import GRID, TERMS, Pricer, Terms, no_terms
from triaxial.plan.serving.cost.probed import probed_engine
from triaxial.plan.serving.engine import OURS, Engine
from triaxial.plan.serving.workload import STORED_BYTES, Serving

Floats = NDArray[np.float64]
Number = float | Floats


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of one replica. Arguments of its methods are those of `StepCost`."""

    body: Terms
    """Everything but attention and logits, over tokens."""
    head: Terms
    """Logits and sampling, over sequences; nothing but on the last stage."""
    body_seconds: Floats
    head_seconds: Floats
    attention: AttentionCost
    issue_s: float
    """Seconds of the host to issue the stage's kernels: no step is faster."""
    reread_s: float = 0.0
    """Seconds to read the weights again for every decoding sequence after the first."""

    def seconds(
        self, tokens: Number, pairs: Number, sequences: Number, context: Number, ending: Number = 0.0
    ) -> Number:
        busy = (
            np.interp(tokens + sequences, GRID, self.body_seconds)
            + np.interp(sequences + ending, GRID, self.head_seconds)
            + self.attention.prefill_seconds(tokens, pairs)
            + self.attention.decode_seconds(sequences, context, tokens)
            + self._reread_seconds(sequences)
        )
        return busy if self.issue_s == 0 else np.maximum(busy, self.issue_s)

    def parts(
        self, tokens: Number, pairs: Number, sequences: Number, context: Number, ending: Number = 0.0
    ) -> dict[str, Number]:
        """`seconds` by term; waiting for the host counts as launches."""
        found: dict[str, Number] = dict.fromkeys(TERMS, 0.0)
        for table, at in ((self.body, tokens + sequences), (self.head, sequences + ending)):
            for term, values in table.seconds.items():
                found[term] = found[term] + np.interp(at, GRID, values)
        found["compute"] = found["compute"] + self.attention.prefill_seconds(tokens, pairs)
        found["kv"] = found["kv"] + self.attention.decode_seconds(sequences, context, tokens)
        found["weights"] = found["weights"] + self._reread_seconds(sequences)
        found["launches"] = found["launches"] + np.maximum(0.0, self.issue_s - sum(found.values()))
        return found

    def _reread_seconds(self, sequences: Number) -> Number:
        return self.reread_s * np.maximum(sequences - 1, 0) if self.reread_s else 0.0


def build_stages(
    model: ModelSpec, cluster: Cluster, layout: Layout, work: Serving, engine: Engine, constants: ServingConstants
) -> tuple[Stage, ...]:
    """Price every stage of one replica.

    Raises:
        BadInput: a precision that the device does not have, or that its probe did not time.
    """
    sizes = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}
    pricer = Pricer(cluster, group_of(cluster, sizes, "tp"), work.precision, engine, constants)
    if cluster.device.timings is not None:
        cluster.device.timings.gemm_in(pricer.wide)  # refuses what was not probed
    dense, expert = (_layer(model, pricer, layout.tp, experts) for experts in (False, True))
    hop = no_terms()
    if layout.pp > 1:
        hop.seconds["hops"] += collective_seconds(
            cluster, "send_recv", STORED_BYTES[pricer.wide] * GRID * model.hidden, group_of(cluster, sizes, "pp")
        )
    start = no_terms()
    if (probed := probed_engine(cluster.device, engine)) is not None:
        start.seconds["launches"] += np.where(GRID > 0, probed.stage_s, 0.0)
    bounds = layer_bounds(model, layout, engine)
    stages = []
    for rank, (first, end) in enumerate(pairwise(bounds)):
        num_dense = max(0, min(end, model.num_dense_layers) - first)
        body = dense.times(num_dense) + expert.times(end - first - num_dense) + start
        head = no_terms()
        if rank == 0:
            body += pricer.terms(embedding_operators(model, layout.tp, GRID, work.precision))
        if rank < layout.pp - 1:
            body += hop
        else:
            head = pricer.terms(head_operators(model, layout.tp, GRID, work.precision))
            head.seconds["sampling"], head.seconds["passes"] = head.seconds["passes"], np.zeros_like(GRID)
        stages.append(
            Stage(
                body=body,
                head=head,
                body_seconds=body.total,
                head_seconds=head.total,
                attention=attention_cost(model, pricer, layout.tp, work.kv_precision, first, end),
                issue_s=constants.hosts[engine.host].kernel_s * (body.kernels + head.kernels),
                reread_s=0.0 if engine.batches_decoding else float(body.seconds["weights"][1]),
            )
        )
    return tuple(stages)


def layer_bounds(model: ModelSpec, layout: Layout, engine: Engine) -> list[int]:
    """First layer of every stage, and the end: as the layout says, by what blocks cost in our engine, and elsewhere as
    evenly as can be."""
    cut = layout.cut
    if not cut and engine.host == OURS.host:
        cut = stage_cut(model, 1, tuple(range(layout.pp)))
    if not cut:
        return [round(model.num_layers * rank / layout.pp) for rank in range(layout.pp + 1)]
    return [0, *(min(max(0, end - 1), model.num_layers) for end in accumulate(cut))]  # the embedding is a block too


def _layer(model: ModelSpec, pricer: Pricer, tp: int, experts: bool) -> Terms:
    if experts and model.experts is None:
        return no_terms()
    operators = layer_operators(model, tp, GRID, pricer.precision, experts=experts)
    if pricer.engine.fused_all_reduce and tp > 1:
        operators = with_fused_all_reduces(operators)
    return pricer.terms(operators) + pricer.attention_kernel()
