"""A layout for the ranks that are left, or that came back, when the world of a run changes its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from triaxial import BadInput
from triaxial.model.spec import ModelSpec, load_model_spec
from triaxial.plan.layout import Layout, check_layout, micro_batches
from triaxial.plan.pipeline.schedule import build_schedule
from triaxial.train.config import TrainConfig


def fit_to_world(config: TrainConfig, world: int, nodes: int, ranks_per_node: int) -> TrainConfig:
    """The run's settings with the layout that the ranks of this world will have; each rank finds the same.

    Raises:
        BadInput: no layout fits, or the nodes have unequally many ranks.
    """
    if nodes * ranks_per_node != world:
        raise BadInput(f"{nodes} nodes have {world} ranks in all and one of them {ranks_per_node}: give each as many")
    spec, layout = load_model_spec(config.model), config.parsed_layout
    fitted = layout_for_world(spec, layout, world, ranks_per_node, config.global_batch, config.seq_len)
    return config.model_copy(update={"layout": str(fitted)})


def layout_for_world(
    spec: ModelSpec, layout: Layout, world: int, ranks_per_node: int, global_batch: int, seq_len: int
) -> Layout:
    """The legal layout of `world` ranks that is nearest to `layout`, which is what they would have with all ranks there.

    The model stays cut over as many ranks (tp * pp) as before, so that each holds no more than before; if that is not
    possible, over as many as there are. Data parallelism takes up the change where it can. tp stays within a node, and
    near what it was; micro-batches get smaller only where the global batch asks for it.

    Raises:
        BadInput: no layout of so many ranks can train this model at this global batch.
    """
    if layout.world_size == world:
        return layout
    for candidate in sorted(_candidates(layout, world, ranks_per_node), key=lambda other: _distance(layout, other)):
        with suppress(BadInput):
            check_layout(candidate, spec, seq_len)
            count = micro_batches(candidate, global_batch)
            build_schedule(candidate.schedule, ranks=candidate.pp, micro_batches=count, virtual_stages=candidate.vpp)
            return candidate
    raise BadInput(
        f"no layout of {world} ranks can train {spec.name} with a global batch of {global_batch} sequences: "
        "start another number of ranks"
    )


def _candidates(layout: Layout, world: int, ranks_per_node: int) -> Iterator[Layout]:
    for tp in _divisors(math.gcd(world, ranks_per_node)):
        for pp in _divisors(world // tp):
            dp = world // tp // pp
            cut = layout.cut if pp == layout.pp else ()
            shard = layout.shard if layout.shard and dp % layout.shard == 0 else 0
            for mb in _divisors(layout.mb):
                with suppress(BadInput):  # a schedule that cannot have so few ranks
                    yield replace(layout, tp=tp, pp=pp, dp=dp, mb=mb, cut=cut, shard=shard)


def _distance(layout: Layout, other: Layout) -> tuple[float, ...]:
    """Compared element by element; the nearest is the smallest."""
    before, after = layout.tp * layout.pp, other.tp * other.pp
    return max(0, before - after), after, abs(math.log2(other.tp / layout.tp)), -other.mb


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
