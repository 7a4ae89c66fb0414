"""Constants fitted without each source in turn, to judge predictions of that source by. Written by
`bench/fit_training.py`, not by hand."""

from __future__ import annotations

from triaxial.plan.training.constants import TrainingConstants

LEFT_OUT: dict[str, TrainingConstants] = {
    "kor": TrainingConstants(host_s_per_operation=2.07e-05, interference=0.397, held_rate=0.895, step_s=0.0168),
    "llmf-a100": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.386, held_rate=0.886, step_s=0.0172),
    "mbridge25": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.43, held_rate=0.903, step_s=0.0175),
    "mbridge26": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.38, held_rate=0.9, step_s=0.0175),
    "mlm2020": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.421, held_rate=0.902, step_s=0.0174),
    "mlmreadme": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.427, held_rate=0.903, step_s=0.0177),
    "mtnlg": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.441, held_rate=0.907, step_s=0.0183),
    "nemo2407": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.418, held_rate=0.904, step_s=0.0174),
    "paddle": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.431, held_rate=0.904, step_s=0.0178),
    "sc21": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.448, held_rate=0.909, step_s=0.0187),
    "titan": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.47, held_rate=0.907, step_s=0.0176),
    "vtrain": TrainingConstants(host_s_per_operation=2.02e-05, interference=0.419, held_rate=0.898, step_s=0.00496),
    "zb": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.432, held_rate=0.905, step_s=0.0181),
}
