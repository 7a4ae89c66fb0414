"""What a probe found, for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

from triaxial.measure.probe import Probe
from triaxial.report.si import seconds_text


def probe_text(found: Probe, out: Path) -> str:
    """The device, every tier's fit, contention, and whatever is slower than the rest."""
    device = found.cluster.device
    peaks = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in device.peak_flop_per_s.items())
    lines = [
        f"{found.cluster.num_nodes} x {found.cluster.gpus_per_node} x {device.name}",
        f"each: {peaks}; {device.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s of memory",
        *(
            f"{fit.tier}: {seconds_text(fit.latency_s)} a message, {fit.bytes_per_s / 1e9:.3g} GB/s "
            f"(fit of the all-reduces, median error {fit.median_error:.0%}; "
            f"from their neighbours, as predictions read them, {fit.left_out_error:.0%})"
            for fit in found.fits
        ),
        *(f"{axis}: {times:.2f} x as long while all its groups talk" for axis, times in found.contention.items()),
        *(found.outliers or ("no rank and no link is slower than the others",)),
        f"written to {out}: use it as --cluster {out}",
    ]
    return "\n".join(lines)


def probe_json(found: Probe) -> str:
    """Everything, the raw points included, as one document."""
    document = {
        "cluster": found.cluster.model_dump(mode="json", exclude_none=True),
        "fits": [vars(fit) for fit in found.fits],
        "contention": found.contention,
        "outliers": found.outliers,
    }
    return json.dumps(document)
