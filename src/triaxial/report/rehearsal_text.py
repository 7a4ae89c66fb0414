"""What a rehearsal did, for people and for machines."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table

from triaxial.cluster.spec import Cluster
from triaxial.measure.rehearsal import PARTS, Rehearsal
from triaxial.measure.script import Script
from triaxial.report.si import seconds_text

_WORDS = {
    "compute": "computation",
    "exposed_tp": "tensor-parallel collectives",
    "exposed_pp": "transfers between stages",
    "bubble": "pipeline bubble",
    "exposed_dp": "data-parallel collectives",
    "update": "update",
}


def script_text(script: Script, cluster: Cluster) -> str:
    """What will be rehearsed, and on what scale."""
    lines = [
        f"{script.layout}, {script.micro_batches} micro-batches, {script.layout.world_size} ranks",
        f"1 s of the cluster takes {script.dilation:.4g} s here: a step {seconds_text(_here_s(script))}",
    ]
    lines += [
        f"{tier.name}: {port.bytes_per_s * 8e-6:.3g} Mbit/s for each rank, a byte stands for {shrinkage:,.0f}"
        for tier, port, shrinkage in zip(cluster.tiers, script.ports, script.shrinkage, strict=True)
    ]
    return "\n".join(lines)


def rehearsal_table(rehearsal: Rehearsal) -> Table:
    """Predicted beside rehearsed, in time of the cluster."""
    table = Table("part of a step", *(Column(name, justify="right") for name in ("predicted", "rehearsed")))
    predicted = rehearsal.predicted_s
    for part in PARTS:
        if predicted[part] or rehearsal.parts_s[part] > 1e-6:
            table.add_row(_WORDS[part], seconds_text(predicted[part]), seconds_text(rehearsal.parts_s[part]))
    table.add_section()
    table.add_row("step", seconds_text(rehearsal.script.predicted.step_time_s), seconds_text(rehearsal.step_time_s))
    return table


def rehearsal_text(rehearsal: Rehearsal) -> str:
    """How far the prediction is off."""
    seconds = rehearsal.steps_s
    spread = f"{len(seconds)} steps, {seconds_text(min(seconds))} to {seconds_text(max(seconds))}"
    steps = "one step" if len(seconds) == 1 else spread
    return f"predicted {rehearsal.error:+.1%} of the rehearsed step ({steps})"


def rehearsal_document(rehearsal: Rehearsal, cluster: Cluster) -> dict[str, Any]:
    """The same as JSON values. Seconds are of the cluster."""
    script = rehearsal.script
    return {
        "layout": str(script.layout),
        "predicted_step_time_s": script.predicted.step_time_s,
        "rehearsed_step_time_s": rehearsal.step_time_s,
        "relative_error": rehearsal.error,
        "predicted_parts_s": rehearsal.predicted_s,
        "rehearsed_parts_s": rehearsal.parts_s,
        "steps_s": list(rehearsal.steps_s),
        "dilation": script.dilation,
        "links": [
            {"tier": tier.name, "bytes_per_s": port.bytes_per_s, "bytes_stand_for": shrinkage}
            for tier, port, shrinkage in zip(cluster.tiers, script.ports, script.shrinkage, strict=True)
        ],
    }


def _here_s(script: Script) -> float:
    return script.predicted.step_time_s * script.dilation
