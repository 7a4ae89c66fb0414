"""The few numbers of the training model that no datasheet gives. Each says what it is and where it comes from.

All eight were fitted by `bench/fit_training.py` on 343 published configurations of dense models from 12 laboratories
(2026-11-24, docs/measured/planner.md). `triaxial validate` also reports the errors with constants that were fitted
without the source they are judged on (`plan/validation/left_out.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingConstants:
    """Physical quantities, not correction factors: one value for every device, model and source."""

    host_s_per_kernel: float = 65e-6
    """Seconds of the Python host to issue one operation and its autograd node. Below this pace the GPU starves."""
    host_s_per_collective: float = 19e-6
    """Seconds of the host to issue one collective."""
    overlap_share: float = 1.0
    """Share of the time that a collective can run beside computation in which it really does."""
    interference: float = 0.23
    """Computation lost per second of a collective that runs beside it: it takes multiprocessors and bandwidth."""
    spread: float = 0.02
    """Standard deviation of the speed of equal devices; a synchronous step waits for the slowest of them."""
    held_rate: float = 0.912
    """Share of an isolated kernel's arithmetic rate that a device holds through hours of training, hot and with cold
    caches. (How power limits an isolated kernel's rate is in `compute.py`.)"""
    throttled_rate: float = 0.925
    """What is left of that on a device whose power limits its clock (`block_seconds.POWER_LIMITED_W_PER_TFLOP`)."""
    step_s: float = 0.0095
    """Seconds once a step outside the model: data loading, learning rate, logging, synchronisation."""


TRAINING = TrainingConstants()
