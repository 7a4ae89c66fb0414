"""The few numbers of the training model that no datasheet gives. Each says what it is and where it comes from.

Four were fitted by `bench/fit_training.py` on 334 published configurations of dense models from 13 laboratories
(2026-11-24, docs/measured/planner.md). `triaxial validate` also reports the errors with constants that were fitted
without the source they are judged on (`plan/validation/left_out.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from triaxial.cluster.hardware import Device


@dataclass(frozen=True, kw_only=True)
class TrainingConstants:
    """Physical quantities, not correction factors: one value for every device, model and source."""

    host_s_per_operation: float = 20.5e-6
    """Seconds of the host to dispatch one operation in eager PyTorch, forward or backward. Below this pace the GPU
    starves."""
    overlap_share: float = 1.0
    """Share of the time that a collective can run beside computation in which it really does. Not fitted: fits of it
    end at 1."""
    overlap_between_nodes: float = 1.0
    """The same for gradients and parameters that go from node to node."""
    interference: float = 0.416
    """Computation lost per second of a collective that runs beside it: it takes multiprocessors and bandwidth."""
    spread: float = 0.012
    """Standard deviation of the speed of equal devices; a synchronous step waits for the slowest of them. Not fitted:
    equal GPUs of large clusters differ by 8 % (arXiv 2208.11035, abstract), and a thousand normally distributed ones
    by 6.5 standard deviations."""
    held_rate: float = 0.902
    """Share of an isolated kernel's arithmetic rate that a device holds through hours of training, hot and with cold
    caches. (How power limits an isolated kernel's rate is in `compute.py`.)"""
    step_s: float = 0.0175
    """Seconds once a step outside the model: data loading, learning rate, logging, synchronisation."""

    def on(self, device: Device) -> TrainingConstants:
        """These constants for a device. A probed one has shown its host's work, its sustained rate and what a step
        costs beside the model; processors that also compute move messages inside their node themselves."""
        if device.timings is None:
            return self
        return replace(
            self,
            host_s_per_operation=0.0,
            spread=0.0,
            held_rate=1.0,
            step_s=device.timings.step_s,
            overlap_share=0.0 if device.generation == "cpu" else self.overlap_share,
        )


TRAINING = TrainingConstants()
