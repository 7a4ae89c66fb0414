"""A layout's pipeline played action by action, with the seconds that the planner expects of each stage."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.placement import place
from triaxial.plan.cost.practice import OURS
from triaxial.plan.layout import Layout, micro_batches
from triaxial.plan.layout_table import layout_table
from triaxial.plan.pipeline.generators import stage_placement
from triaxial.plan.pipeline.schedule import build_schedule
from triaxial.plan.pipeline.simulate import Durations, Simulation, StageCosts, Transfer, simulate
from triaxial.plan.pipeline.stages import rank_loads, stage_cut
from triaxial.plan.training.block_seconds import model_seconds, price_blocks
from triaxial.plan.training.constants import TRAINING
from triaxial.plan.training.hops import tier_seconds
from triaxial.plan.workload import Training


def play(model: ModelSpec, cluster: Cluster, training: Training, layout: Layout) -> Simulation:
    """Simulate the schedule of a legal layout with uneven stages as they are."""
    table = layout_table([layout])
    placement = place(cluster, table)
    seconds = model_seconds(price_blocks(model, training, OURS, table, placement), table.recompute, OURS, TRAINING)
    ranks = stage_placement(layout.schedule, layout.pp, layout.vpp)
    cut = layout.cut or stage_cut(model, training.seq_len, ranks)
    # every virtual stage as if it were a rank of its own
    held = rank_loads(cut, layout.num_stages, "1f1b", model.num_dense_layers)
    phases = seconds.on_rank(held).phases  # [phase, stage]
    hop, members = tier_seconds(model, training, table, placement)[:, 0], placement.members("pp")[:, 0]
    # the innermost tier with a unit that holds both ranks
    crossed = [np.argmax(a // members == b // members) for a, b in pairwise(ranks)]
    costs = StageCosts(
        forward_s=tuple(phases[0].tolist()),
        input_s=tuple(phases[1].tolist()),
        weight_s=tuple(phases[2].tolist()),
        transfers=tuple(Transfer(latency_s=float(hop[tier])) for tier in crossed),
    )
    schedule = build_schedule(
        layout.schedule,
        ranks=layout.pp,
        micro_batches=micro_batches(layout, training.global_batch),
        virtual_stages=layout.vpp if layout.vpp > 1 else None,
        durations=Durations(*np.mean(phases, axis=1).tolist()),
    )
    return simulate(schedule, costs)
