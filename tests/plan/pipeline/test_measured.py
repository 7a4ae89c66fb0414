"""A measured step as a file, and what the simulator makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from triaxial import BadInput
from triaxial.cli.schedule import command
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.plan.pipeline.schedule import Durations, Schedule, build_schedule
from triaxial.plan.pipeline.simulate import StageCosts, Transfer, simulate

SCHEDULE = build_schedule("zb-v", ranks=2, micro_batches=4)
COSTS = StageCosts(forward_s=(1.0, 2.0, 2.0, 3.0), input_s=(1.0, 2.0, 2.0, 4.0), weight_s=(1.0, 1.0, 2.0, 2.0))


def measured(costs: StageCosts = COSTS, schedule: Schedule = SCHEDULE) -> MeasuredStep:
    return MeasuredStep(2, schedule, simulate(schedule, costs).timeline)


def test_a_measured_step_comes_back_from_its_file() -> None:
    assert MeasuredStep.from_json(measured().to_json()) == measured()
    assert Schedule.from_json(measured().to_json()) == SCHEDULE, "the file is a table too"


def test_costs_are_the_mean_of_each_kind_of_action_on_each_stage() -> None:
    costs = measured().costs
    assert costs.forward_s == pytest.approx(COSTS.forward_s)
    assert costs.input_s == pytest.approx(COSTS.input_s)
    assert costs.weight_s == pytest.approx(COSTS.weight_s)
    whole = build_schedule("1f1b", ranks=4, micro_batches=4)
    assert measured(COSTS, whole).costs.backward_s == pytest.approx((2.0, 3.0, 4.0, 6.0))


def test_the_prediction_leaves_out_what_messages_cost() -> None:
    slow = StageCosts.uniform(4, Durations(1.0, 1.0, 1.0), Transfer(latency_s=0.5))
    step = measured(slow)
    free = simulate(SCHEDULE, StageCosts.uniform(4, Durations(1.0, 1.0, 1.0))).step_time_s
    assert simulate(SCHEDULE, step.costs).step_time_s == pytest.approx(free)
    assert step.timeline.step_time_s > free


def changed(path: tuple[Any, ...], value: object) -> str:
    document = json.loads(measured().to_json())
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "num_micro_batches: Field required"),
        (changed(("ranks", 1, "begin_s"), [0.0]), "rank 1 has 24 actions but not as many begins and ends"),
        (changed(("ranks", 0, "end_s", 3), -1.0), "the times of rank 0 run backwards"),
        (changed(("step",), "x"), "step: "),
    ],
)
def test_a_damaged_file_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        MeasuredStep.from_json(text)


def test_the_command_shows_predicted_above_measured(tmp_path: Path) -> None:
    slow = StageCosts.uniform(4, Durations(1.0, 1.0, 1.0), Transfer(latency_s=0.5))
    step = measured(slow)
    (tmp_path / "timeline.json").write_text(step.to_json())
    svg, trace = tmp_path / "t.svg", tmp_path / "t.json"
    arguments = ["--run", str(tmp_path), "--svg", str(svg), "--trace", str(trace), "--json"]
    document = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    assert document["step"] == 2
    assert document["measured"]["step_time"] == pytest.approx(step.timeline.step_time_s)
    assert document["predicted"]["step_time"] == pytest.approx(simulate(SCHEDULE, step.costs).step_time_s)
    picture = svg.read_text()
    assert picture.index("predicted: zb-v, 4 micro-batches") < picture.index("measured: step 3")
    assert len({event["pid"] for event in json.loads(trace.read_text())["traceEvents"]}) == 2
    text = CliRunner().invoke(command, ["--run", str(tmp_path)], catch_exceptions=False).stdout
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["predicted", "measured"]


def test_a_run_without_a_timeline_and_a_second_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no timeline\.json"):
        CliRunner().invoke(command, ["--run", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(BadInput, match="--run says all about the schedule"):
        CliRunner().invoke(command, ["--run", str(tmp_path), "--kind", "1f1b"], catch_exceptions=False)
