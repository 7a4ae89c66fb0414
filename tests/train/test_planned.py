"""A training run takes from a plan what the plan says, and only what can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.plan.shapes import llama
from triaxial import BadInput
from triaxial.cli import cli
from triaxial.cluster.spec import load_cluster
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.search.explain import RUNNABLE
from triaxial.plan.search.plan import plan_training
from triaxial.plan.workload import Training
from triaxial.train.planned import plan_layout, read_plan

PRESET = "llama-3.1-8b"
WORK = Training(global_batch=16, seq_len=2048)


def plan_file(folder: Path, **changes: Any) -> Path:
    made = plan_training(load_model_spec(PRESET), load_cluster("1x8xA100"), WORK, top=2, flips=False).to_dict()
    path = folder / "plan.json"
    path.write_text(json.dumps(made | changes), encoding="utf-8")
    return path


def test_a_plan_file_gives_model_layout_and_workload(tmp_path: Path) -> None:
    path = plan_file(tmp_path)
    best = json.loads(path.read_text(encoding="utf-8"))["plans"][0]["layout"]
    wanted = {"model": PRESET, "layout": best, "global_batch": 16, "seq_len": 2048, "precision": "bf16"}
    assert read_plan(path, None) == wanted
    assert read_plan(path, PRESET) == wanted


def test_the_best_layout_that_can_run_is_taken(tmp_path: Path) -> None:
    planned_only, runnable = {"layout": "tp=1,cp=8"}, {"layout": "tp=8,sp=1"}
    first = plan_file(tmp_path, plans=[planned_only, runnable], why={"rivals": {}})
    assert read_plan(first, None)["layout"] == str(parse_layout("tp=8,sp=1"))
    rival = plan_file(tmp_path, plans=[planned_only], why={"rivals": {RUNNABLE: runnable}})
    assert read_plan(rival, None)["layout"] == str(parse_layout("tp=8,sp=1"))
    neither = plan_file(tmp_path, plans=[planned_only], why={"rivals": {RUNNABLE: "nothing fits"}})
    with pytest.raises(BadInput, match="use cp=1 and ep=1"):
        read_plan(neither, None)


def test_what_is_no_plan_of_this_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"plan for llama-3.1-8b, not for llama-3.2-1b"):
        read_plan(plan_file(tmp_path), "llama-3.2-1b")
    for document in ("[]", "{}", "no JSON", json.dumps({"model": llama().model_dump(), "plans": [{}]})):
        (tmp_path / "other.json").write_text(document, encoding="utf-8")
        with pytest.raises(BadInput, match="no training plan"):
            read_plan(tmp_path / "other.json", None)
    with pytest.raises(BadInput, match="No such file"):
        read_plan(tmp_path / "missing.json", None)


def test_planning_for_a_cluster_gives_a_layout_of_all_its_devices_that_can_run() -> None:
    layout = parse_layout(plan_layout("2x8xA100", {"model": PRESET, "global_batch": 32, "seq_len": 2048}))
    assert layout.world_size == 16
    assert layout.cp == layout.ep == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--auto", "--layout", "tp=1"), "one of --layout, --plan and --auto"),
        (("--auto", "--plan", "plan.json"), "one of --layout, --plan and --auto"),
        (("--auto", "--cluster", "1x8xA1000"), "A1000"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(cli, ["train", PRESET, "--data", "none.txt", *flags])
    assert says in str(result.exception or result.output)
    assert result.exit_code != 0


@pytest.mark.parametrize(("changes", "says"), [({"precision": "fp64"}, "precision"), ({"global_batch": 0}, "batch")])
def test_a_workload_that_cannot_be_planned_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        plan_layout("1x8xA100", {"model": PRESET, **changes})
