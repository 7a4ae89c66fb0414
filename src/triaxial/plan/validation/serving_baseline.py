"""What a spreadsheet predicts: every prompt at one MFU, every decode step at one share of the memory bandwidth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from triaxial.plan.serving.constants import HostTimes
from triaxial.plan.serving.cost.attention import AttentionCost
from triaxial.plan.serving.cost.pricing import GRID, multiplied_in, no_terms
from triaxial.plan.serving.cost.stage import Stage
from triaxial.plan.serving.cost.step import StepCost
from triaxial.plan.validation.serving_points import ServedPoint

MFU = 0.45
MBU = 0.65
"""Shares of the peak rates that fit inference.csv and the dense models of serving_latency.csv best (median error)."""


def roofline_cost(point: ServedPoint, cost: StepCost, mfu: float = MFU, mbu: float = MBU) -> StepCost:
    """The spreadsheet's cost of a point's steps, with the memory and the engine of `cost`."""
    device, layout = point.cluster.device, point.layout
    bandwidth = device.memory_bandwidth_bytes_per_s * mbu
    peak = device.peak(multiplied_in(device, point.work.precision)) * mfu
    token_s = 2 * point.model.matmul_parameters / (layout.tp * layout.pp) / peak
    weights_s = cost.memory.weights_bytes / bandwidth
    kv_s = cost.memory.kv_bytes_per_token / bandwidth
    stage = Stage(
        body=no_terms(),
        head=no_terms(),
        body_seconds=np.maximum(GRID * token_s, weights_s),
        head_seconds=np.zeros_like(GRID),
        attention=AttentionCost(
            full_layers=1, windowed_layers=0, window=0, pair_s=0.0, token_s=kv_s, mixed_token_s=kv_s
        ),
        issue_s=0.0,
    )
    return replace(cost, stages=(stage,) * layout.pp, host=HostTimes(step_s=0.0, sequence_s=0.0))
