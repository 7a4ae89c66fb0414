"""`triaxial schedule` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from triaxial import BadInput
from triaxial.cli import main
from triaxial.cli.schedule import command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_json_holds_the_step_the_bubble_and_every_rank() -> None:
    document = json.loads(run("--kind", "1f1b", "--stages", "8", "--micro-batches", "32", "--json").stdout)
    assert document["step_time"] == 117.0
    assert document["bubble_fraction"] == pytest.approx(7 / 39)
    assert "zero_bubble_rate" not in document
    assert [rank["peak_activations"] for rank in document["ranks"]] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert document["ranks"][7]["actions"][:4] == ["7F0", "7B0", "7F1", "7B1"]


def test_zero_bubble_kinds_name_both_bubbles() -> None:
    arguments = ("--kind", "zb-v", "--stages", "8", "--micro-batches", "32")
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["step_time"] == pytest.approx(99.5), "each of the two stages on a rank takes half"
    assert document["zero_bubble_rate"] == pytest.approx(0)
    assert document["bubble_fraction"] == pytest.approx(1 - 96 / 99.5)
    text = run(*arguments).stdout
    assert "step 99.5 s, bubble 3.5% of it" in text
    assert "bubble rate of the zero-bubble papers 0.0%: (cost - m (TF + TB + TW)) / cost" in text


def test_durations_are_forward_input_gradient_and_weight_gradient() -> None:
    arguments = ("--stages", "1", "--micro-batches", "1", "--durations", "0.5,2,4", "--json")
    assert json.loads(run("--kind", "1f1b", *arguments).stdout)["step_time"] == 6.5
    assert json.loads(run("--kind", "zb-h1", *arguments).stdout)["step_time"] == 6.5


def test_small_schedules_are_drawn_and_large_ones_say_how() -> None:
    small = run("--kind", "1f1b", "--stages", "2", "--micro-batches", "2").stdout
    assert "0 F0F1    B0--  B1--" in small
    assert "--svg FILE draws it" in run("--kind", "1f1b", "--stages", "8", "--micro-batches", "32").stdout


def test_what_json_wrote_table_reads_back(tmp_path: Path) -> None:
    written = run("--kind", "zb-h2", "--stages", "3", "--micro-batches", "7", "--json").stdout
    table = tmp_path / "table.json"
    table.write_text(written)
    assert json.loads(run("--table", str(table), "--json").stdout) == json.loads(written)


def test_a_table_that_deadlocks_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text('{"num_micro_batches": 1, "placement": [0], "ranks": [{"actions": ["0B0", "0F0"]}]}')
    with pytest.raises(BadInput, match="would deadlock: rank 0: 0B0"):
        run("--table", str(table))


def test_pictures_and_traces_are_written_whole(tmp_path: Path) -> None:
    svg, trace = tmp_path / "out.svg", tmp_path / "out.json"
    run("--kind", "zb-v", "--stages", "2", "--micro-batches", "4", "--svg", str(svg), "--trace", str(trace))
    assert ElementTree.fromstring(svg.read_text(encoding="utf-8")).tag.endswith("svg")
    assert sum(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"]) == 2 * 2 * 4 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.svg"]


NAMED = ("--kind", "1f1b", "--stages", "2", "--micro-batches", "2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--kind", "1f1b", "--stages", "2"), "name a schedule by --kind, --stages and --micro-batches"),
        ((*NAMED, "--durations", "1,2"), "'1,2' is not three numbers"),
        ((*NAMED, "--durations", "1,a,2"), "'1,a,2' is not three numbers"),
        ((*NAMED, "--durations", "1,-1,2"), "seconds of 0 or more"),
        ((*NAMED, "--durations", "0,0,0"), "not all 0"),
        ((*NAMED, "--durations", "1,nan,2"), "seconds of 0 or more"),
        ((*NAMED, "--memory-limit", "1"), "holds 2 activations at once"),
        ((*NAMED, "--table", "table.json"), "leave out --kind"),
        (("--table", "missing.json"), "cannot read missing.json: No such file"),
        ((*NAMED, "--svg", "missing/out.svg"), "cannot write missing/out.svg: No such file"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(BadInput, match=says) as refusal:
        run(*arguments)
    assert "\n" not in str(refusal.value)


def test_bad_input_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["triaxial", "schedule", "--kind", "zb-w", "--stages", "2", "--micro-batches", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "'zb-w' is not one of 'gpipe', '1f1b'" in capsys.readouterr().err
