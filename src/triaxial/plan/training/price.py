"""The price of a training step: seconds and bytes of every layout, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.cost.compute import pass_seconds
from triaxial.plan.cost.placement import place
from triaxial.plan.cost.practice import OURS, Practice
from triaxial.plan.layout import Layout
from triaxial.plan.layout_table import LayoutTable, layout_table
from triaxial.plan.legal import check_training_layout
from triaxial.plan.pipeline.stages import Loads, heaviest_ranks
from triaxial.plan.training.block_seconds import ModelSeconds, PricedBlocks, model_seconds, price_blocks, shard_of
from triaxial.plan.training.constants import TRAINING, TrainingConstants
from triaxial.plan.training.hops import hops_of, tied_seconds
from triaxial.plan.training.memory import USABLE_MEMORY, Memory, data_ep, expert_shards, memory, rank_weights
from triaxial.plan.training.pipeline_seconds import StageSeconds, bubble_seconds, transfer_seconds
from triaxial.plan.training.reduction import data_parallel_seconds
from triaxial.plan.training.shared_processors import shared_waiting_seconds
from triaxial.plan.training.zero_bubble_v import excess_seconds
from triaxial.plan.workload import Training

Floats = NDArray[np.float64]
GIB = 2.0**30


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step by part, on the slowest pipeline rank; they add up to the step."""

    compute: Floats
    """Matrix products, attention, memory-bound passes, recomputation, waiting for the slowest device."""
    exposed_tp: Floats
    exposed_cp: Floats
    exposed_ep: Floats
    exposed_pp: Floats
    exposed_dp: Floats
    bubble: Floats
    optimizer: Floats
    """The parameter update and what a program does once a step."""
    data: Floats
    """Reading the step's tokens, where a probe has timed that; nothing elsewhere, where it hides."""
    hidden: dict[str, Floats]
    """Communication by axis that runs beside computation, and so adds nothing to the step but `interference`."""

    @property
    def step(self) -> Floats:
        total: Floats = sum(self.parts().values(), np.zeros_like(self.compute))
        return total

    def parts(self) -> dict[str, Floats]:
        return {name: seconds for name, seconds in vars(self).items() if name != "hidden"}


@dataclass(frozen=True)
class Estimate:
    """What one layout is predicted to do."""

    layout: Layout
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    model_tflops_per_gpu: float
    mfu: float
    """Share of the device's dense peak for the precision, counting model FLOP only (arXiv 2204.02311, appendix B)."""
    bubble_fraction: float
    fits: bool
    memory_gib: dict[str, float]
    """GiB on the fullest rank: `peak`, and its parts."""
    time_s: dict[str, float]
    """Seconds of the step by part; they add up to `step_time_s`."""
    hidden_s: dict[str, float]
    """Seconds of communication by axis (tp, cp, pp, dp) that hide behind computation."""

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return {**vars(self), "layout": str(self.layout)}


def memory_of(
    model: ModelSpec, training: Training, practice: Practice, table: LayoutTable, loads: Loads | None = None
) -> Memory:
    """Bytes of the fullest rank of every layout."""
    loads = loads or heaviest_ranks(model, training.seq_len, table, table.micro_batches(training.global_batch))
    return memory(model, training, practice, table, loads, shard_of(table))


def fits(cluster: Cluster, peak_bytes: Floats) -> NDArray[np.bool_]:
    return peak_bytes <= USABLE_MEMORY * cluster.device.memory_bytes


def step_seconds(
    model: ModelSpec,
    cluster: Cluster,
    training: Training,
    table: LayoutTable,
    practice: Practice = OURS,
    constants: TrainingConstants = TRAINING,
    priced: PricedBlocks | None = None,
    loads: Loads | None = None,
    play_zb_v: bool = False,
) -> StepSeconds:
    """Seconds of one optimizer step in every layout.

    Args:
        priced: the same layouts' blocks, if they are priced already (by a search, or a fit of the constants).
        loads: what the layouts' heaviest ranks hold, if that is known already.
        play_zb_v: play ZB-V where its closed form is inexact; for few layouts.
    """
    priced = priced or price_blocks(model, training, practice, table, place(cluster, table))
    placement, constants = priced.placement, constants.on(cluster.device)
    seconds = model_seconds(priced, table.recompute, practice, constants)
    count = table.micro_batches(training.global_batch)
    loads = loads or heaviest_ranks(model, training.seq_len, table, count)
    slowest = _slowest_rank(seconds, loads)
    # one micro-batch on the slowest rank, and on all others together
    own = seconds.on_rank(slowest)
    whole = seconds.on_rank(all_ranks(model, len(table)))
    stage = StageSeconds(*own.phases)
    others = StageSeconds(*whole.phases) - stage
    bubble = bubble_seconds(table.schedule, table.pp, table.vpp, count, stage, others, practice.staggered_steps)
    if play_zb_v:
        average = StageSeconds(*whole.phases / table.pp)
        bubble = bubble + excess_seconds(table.schedule, table.pp, count, average)
    compute, tp, cp, ep = own.table.sum(axis=0) * count
    hidden_tp, hidden_cp = own.hidden.sum(axis=0) * count
    hops = hops_of(model, training, table, placement)
    exposed_pp = transfer_seconds(
        table.schedule, table.vpp, count, hops, practice.overlap_pipeline, practice.staggered_steps
    )
    hop = hops.mean(table.pp, table.vpp)
    timings = cluster.device.timings
    if timings is not None and timings.ranks_per_processor > 1:
        bubble, exposed_pp = shared_waiting_seconds(
            timings.ranks_per_processor, table, count, stage.total, stage.total + others.total, hop
        )
    hidden_pp = np.maximum(0.0, 2 * table.vpp * count * hop - exposed_pp)
    exposed_pp = exposed_pp + tied_seconds(model, practice, table, placement)

    # all stages reduce and update at once at the end: the one with the most parameters is waited for
    replicated, routed = (held.max(axis=0) for held in rank_weights(model, table.tp, data_ep(table), loads))
    exposed_dp, hidden_dp = data_parallel_seconds(
        training,
        practice,
        constants,
        table,
        placement,
        weights=replicated + routed,
        layers=(loads.dense_layers + loads.expert_layers).max(axis=0),
        forward=stage.forward,
        backward=stage.input_grad + stage.weight_grad,
    )
    return StepSeconds(
        compute=compute,
        exposed_tp=tp,
        exposed_cp=cp,
        exposed_ep=ep,
        exposed_pp=exposed_pp,
        exposed_dp=exposed_dp,
        bubble=bubble,
        optimizer=_optimizer_seconds(cluster, training, practice, table, replicated, routed) + constants.step_s,
        data=training.tokens / table.dp * (cluster.device.timings.token_s if cluster.device.timings else 0.0),
        hidden={"tp": hidden_tp, "cp": hidden_cp, "pp": hidden_pp, "dp": hidden_dp},
    )


def _slowest_rank(seconds: ModelSeconds, loads: Loads) -> Loads:
    """The candidate that takes longest for one micro-batch, one per layout."""
    chosen = seconds.total_on_rank(loads).argmax(axis=0)[None, :]
    return Loads(*(np.take_along_axis(field, chosen, axis=0)[0] for field in loads.rows()))


def all_ranks(model: ModelSpec, layouts: int) -> Loads:
    """What all pipeline ranks hold together, for so many layouts: [one candidate, layouts]."""
    one = np.ones((1, layouts))
    experts = model.num_layers - model.num_dense_layers
    return Loads(model.num_dense_layers * one, experts * one, one, one, one)


def _optimizer_seconds(
    cluster: Cluster,
    training: Training,
    practice: Practice,
    table: LayoutTable,
    replicated: Floats,
    routed: Floats,
) -> Floats:
    """The update reads and writes the state, reads the gradient and writes the parameter; clipping reads the gradient
    twice and writes it; clearing writes it."""
    per_parameter = 2 * training.state_bytes + training.element_bytes + 5 * practice.gradient_bytes
    updated = replicated / table.state_shards + routed / expert_shards(table)
    return pass_seconds(cluster.device, updated * per_parameter)


def estimates(
    model: ModelSpec,
    cluster: Cluster,
    training: Training,
    table: LayoutTable,
    practice: Practice = OURS,
    constants: TrainingConstants = TRAINING,
) -> list[Estimate]:
    """Price layouts that are known to be legal."""
    seconds = step_seconds(model, cluster, training, table, practice, constants, play_zb_v=True)
    held = memory_of(model, training, practice, table).on(cluster.device)
    step, fit = seconds.step, fits(cluster, held.peak)
    flop = model.train_flop_per_token(training.seq_len) * training.tokens
    result = []
    for row in range(len(table)):
        layout = table.layout(row)
        time_s = {part: float(values[row]) for part, values in seconds.parts().items()}
        step_s, gpus = float(step[row]), layout.world_size
        parts = {part: float(values[row]) / GIB for part, values in held.parts().items()}
        pipeline_s = step_s - time_s["exposed_dp"] - time_s["optimizer"] - time_s["data"]
        result.append(
            Estimate(
                layout=layout,
                step_time_s=step_s,
                tokens_per_s=training.tokens / step_s,
                tokens_per_s_per_gpu=training.tokens / step_s / gpus,
                model_tflops_per_gpu=flop / step_s / gpus / 1e12,
                mfu=flop / step_s / gpus / cluster.device.peak(training.precision),
                bubble_fraction=time_s["bubble"] / pipeline_s,
                fits=bool(fit[row]),
                memory_gib={"peak": float(held.peak[row]) / GIB, **parts},
                time_s=time_s,
                hidden_s={axis: float(values[row]) for axis, values in seconds.hidden.items()},
            )
        )
    return result


def estimate(
    model: ModelSpec,
    cluster: Cluster,
    training: Training,
    layout: Layout,
    practice: Practice = OURS,
    constants: TrainingConstants = TRAINING,
) -> Estimate:
    """Price one layout.

    Raises:
        BadInput: the layout cannot carry the model, the batch or the cluster.
    """
    check_training_layout(layout, model, cluster, training)
    return estimates(model, cluster, training, layout_table([layout]), practice, constants)[0]
