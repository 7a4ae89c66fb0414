"""Constants fitted without each source in turn, to judge predictions of that source by. Written by
`bench/fit_training.py`, not by hand."""

from __future__ import annotations

from triaxial.plan.training.constants import TrainingConstants

LEFT_OUT: dict[str, TrainingConstants] = {
    "kor": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.396, held_rate=0.893, step_s=0.0167),
    "llmf-a100": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.401, held_rate=0.89, step_s=0.0177),
    "mbridge25": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.431, held_rate=0.901, step_s=0.0175),
    "mbridge26": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.382, held_rate=0.898, step_s=0.0175),
    "mlm2020": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.42, held_rate=0.9, step_s=0.0175),
    "mlmreadme": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.426, held_rate=0.901, step_s=0.0177),
    "mtnlg": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.44, held_rate=0.905, step_s=0.0183),
    "nemo2407": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.419, held_rate=0.902, step_s=0.0174),
    "paddle": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.431, held_rate=0.903, step_s=0.0178),
    "sc21": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.433, held_rate=0.903, step_s=0.0181),
    "titan": TrainingConstants(host_s_per_operation=2.06e-05, interference=0.469, held_rate=0.905, step_s=0.0176),
    "vtrain": TrainingConstants(host_s_per_operation=2.01e-05, interference=0.415, held_rate=0.895, step_s=0.00552),
    "zb": TrainingConstants(host_s_per_operation=2.05e-05, interference=0.429, held_rate=0.902, step_s=0.0181),
}
