"""Constants fitted without each source in turn, to judge predictions of that source by. Written by
`bench/fit_training.py`, not by hand."""

from __future__ import annotations

from triaxial.plan.training.constants import TrainingConstants

LEFT_OUT: dict[str, TrainingConstants] = {
    "kor": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.389, held_rate=0.895, step_s=0.0167),
    "llmf-a100": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.394, held_rate=0.891, step_s=0.0176),
    "mbridge25": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.422, held_rate=0.903, step_s=0.0175),
    "mbridge26": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.376, held_rate=0.899, step_s=0.0177),
    "mlm2020": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.419, held_rate=0.903, step_s=0.0171),
    "mlmreadme": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.416, held_rate=0.902, step_s=0.0175),
    "mtnlg": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.434, held_rate=0.907, step_s=0.0183),
    "nemo2407": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.418, held_rate=0.903, step_s=0.0174),
    "paddle": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.425, held_rate=0.904, step_s=0.0178),
    "sc21": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.421, held_rate=0.903, step_s=0.0177),
    "titan": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.456, held_rate=0.907, step_s=0.0176),
    "vtrain": TrainingConstants(host_s_per_operation=2.01e-05, interference=0.409, held_rate=0.897, step_s=0.00666),
    "zb": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.428, held_rate=0.905, step_s=0.0182),
}
