"""A rehearsal keeps the plan's ratios, sends what the script says, and orders layouts as their links do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from click.testing import CliRunner

from triaxial import BadInput, NoAnswer
from triaxial.cli import cli
from triaxial.cluster.spec import load_cluster
from triaxial.measure.crew import run_crew
from triaxial.measure.namespaces import require_namespaces
from triaxial.measure.rehearsal import PARTS, Rehearsal, rehearse, waited_for_messages_s
from triaxial.measure.script import Script, write_script
from triaxial.model.spec import load_model_spec
from triaxial.plan.layout import parse_layout
from triaxial.plan.pipeline.action import Action
from triaxial.plan.pipeline.schedule import build_schedule
from triaxial.plan.pipeline.timeline import Span
from triaxial.plan.training.alone import price_alone
from triaxial.plan.workload import Training

MODEL, CLUSTER = load_model_spec("llama-3.2-3b"), load_cluster("2x2xH100-SXM")
WORK = Training(global_batch=4, seq_len=2048)
NVLINK, INFINIBAND = 450e9 * 0.83, 50e9 * 0.9
"""Of one rank: the catalogue's rates and the shares of them that the cost model reaches."""


def script_of(layout: str, dilation: float | None = 20.0, cluster: str = "2x2xH100-SXM") -> Script:
    return write_script(MODEL, load_cluster(cluster), WORK, parse_layout(layout), dilation)


@pytest.mark.parametrize("layout", ["tp=2,pp=2", "tp=2,pp=2,sp=1,schedule=zb-h1", "pp=2,dp=2,zero=2", "dp=4,zero=3"])
def test_waits_and_messages_grow_with_the_dilation_and_links_stay(layout: str) -> None:
    once, twice = script_of(layout, 20.0), script_of(layout, 40.0)
    alone = price_alone(MODEL, CLUSTER, WORK, once.layout, once.predicted)
    assert once.ports == twice.ports
    for script, dilation in ((once, 20.0), (twice, 40.0)):
        waits = [(b.forward_s, b.input_s, b.weight_s) for stage in script.stages for b in stage]
        assert [sum(kind) for kind in zip(*waits)] == pytest.approx(alone.compute_s.sum(axis=1) * dilation)
        assert script.update_s == pytest.approx(alone.update_s * dilation)
        assert script.slowed_s == pytest.approx(alone.slowed_s * dilation)
        assert [script.shrinkage[0] * p.bytes_per_s * dilation for p in script.ports[:1]] == pytest.approx([NVLINK])
        assert [script.shrinkage[1] * p.bytes_per_s * dilation for p in script.ports[1:]] == pytest.approx([INFINIBAND])


def test_a_message_takes_its_predicted_time_at_the_rate_of_its_port() -> None:
    script = script_of("tp=2,pp=2")
    alone = price_alone(MODEL, CLUSTER, WORK, script.layout, script.predicted)
    inside, across = script.ports
    assert script.message_elements * 4 == pytest.approx(alone.hop_s * 20 * across.bytes_per_s, abs=2)
    forward = sum(block.forward_elements for stage in script.stages for block in stage) * 4
    blocks = sum(map(len, script.stages))  # a ring of two sends half of the message twice
    assert forward == pytest.approx(alone.tp_s[0].sum() * 20 * inside.bytes_per_s, abs=8 * blocks)
    script = script_of("tp=2,dp=2,zero=1")
    alone = price_alone(MODEL, CLUSTER, WORK, script.layout, script.predicted)
    reduced = sum(script.unit_elements[0]) * 4  # of two ranks, each sends half
    assert reduced / 2 == pytest.approx(alone.reduce_s.sum() * 20 * across.bytes_per_s, abs=2 * blocks)


def test_a_tied_table_is_exchanged_where_its_copies_are_on_two_ranks() -> None:
    script = script_of("pp=4")
    alone = price_alone(MODEL, CLUSTER, WORK, script.layout, script.predicted)
    assert script.tied_elements * 4 == pytest.approx(alone.tied_s * 20 * script.ports[1].bytes_per_s, abs=2)
    assert script_of("pp=4,vpp=2,schedule=zb-v").tied_elements == script_of("dp=4").tied_elements == 0


def test_ports_are_to_each_other_as_the_links_are_down_to_the_slowest_that_packets_allow() -> None:
    inside, across = script_of("tp=2,pp=2").ports
    assert inside.bytes_per_s / across.bytes_per_s == pytest.approx(NVLINK / INFINIBAND)
    assert (inside.ranks, across.ranks) == (2, 4)
    slow = load_cluster("2x2xH100-SXM", inter="1Gb/s")
    assert write_script(MODEL, slow, WORK, parse_layout("tp=2,pp=2")).ports[1].bytes_per_s == 1e6


def test_the_dilation_is_chosen_so_that_steps_last_some_seconds() -> None:
    for layout in ("tp=2,pp=2", "dp=4,zero=1"):
        script = script_of(layout, None)
        assert 7.99 < script.dilation * script.predicted.step_time_s < 20.01


@pytest.mark.parametrize(
    ("layout", "cluster", "says"),
    [("cp=4", "2x2xH100-SXM", "cp=1 and ep=1"), ("dp=128", "16x8xH100-SXM", "up to 32"), ("dp=2", "2x2xH100-SXM", "4")],
)
def test_what_cannot_be_rehearsed_is_refused(layout: str, cluster: str, says: str) -> None:
    work = Training(global_batch=128, seq_len=2048)
    with pytest.raises(BadInput, match=says):
        write_script(MODEL, load_cluster(cluster), work, parse_layout(layout))


def test_waiting_for_a_message_is_told_from_waiting_for_its_producer() -> None:
    schedule = build_schedule("gpipe", ranks=2, micro_batches=1)
    forward, backward = (Action(kind, 0, 0) for kind in "FB")
    later_forward, later_backward = (Action(kind, 1, 0) for kind in "FB")
    spans = (
        (Span(forward, 1.0, 2.0), Span(backward, 7.0, 8.0)),
        (Span(later_forward, 2.5, 4.0), Span(later_backward, 4.0, 6.0)),
    )
    assert waited_for_messages_s(schedule, spans, 1, 1.0) == pytest.approx(
        0.5
    )  # not the second before its producer ended
    assert waited_for_messages_s(schedule, spans, 0, 1.0) == pytest.approx(1.0)
    assert waited_for_messages_s(schedule, spans, 1, 2.2) == pytest.approx(
        0.3
    )  # it was busy with something else until then


def test_without_root_one_sentence_names_the_fix(tmp_path: Path) -> None:
    plan = saved_plan(tmp_path)
    with mock.patch("os.geteuid", return_value=1000):
        result = CliRunner().invoke(cli, ["rehearse", str(plan)])
    assert isinstance(result.exception, BadInput)
    assert "sudo" in str(result.exception) or "install" in str(result.exception)


def saved_plan(folder: Path) -> Path:
    """As `triaxial plan --out` writes it, as far as it is read."""
    path = folder / "plan.json"
    document = {
        "model": MODEL.model_dump(),
        "cluster": CLUSTER.model_dump(),
        "workload": vars(WORK),
        "plans": [{"layout": "cp=4"}, {"layout": "tp=2,pp=2"}],
        "why": {"rivals": {}},
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


try:
    require_namespaces()
    REFUSAL = ""
except BadInput as refusal:
    REFUSAL = str(refusal)
needs_namespaces = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


@pytest.fixture(scope="module")
def found() -> dict[str, Rehearsal]:
    """Two layouts that differ in which axis crosses the slow link, and one that shards."""
    layouts = ("tp=2,pp=2", "tp=2,pp=2,order=pp-cp-dp-tp", "tp=2,dp=2,zero=1")
    return {layout: rehearse(script_of(layout, 8.0), steps=1) for layout in layouts}


@needs_namespaces
def test_ranks_send_what_the_script_says(found: dict[str, Rehearsal]) -> None:
    pipelined = found["tp=2,pp=2"]
    script, count = pipelined.script, pipelined.script.micro_batches
    for rank, record in enumerate(pipelined.records):  # the first two ranks hold the first stage
        stage = script.stages[rank // 2]
        elements = sum(block.forward_elements + block.input_elements for block in stage)
        assert record.sent_bytes["tp"] == {"all_reduce": count * elements * 4}
        assert record.sent_bytes["pp"] == {"send": count * script.message_elements * 4}
        assert record.sent_bytes["ends"] == {"all_reduce": script.tied_elements * 4}
        assert [str(span.action) for span in record.steps[1].spans] == [
            str(action) for action in build_schedule("1f1b", ranks=2, micro_batches=count).ranks[rank // 2]
        ]
    sharded = found["tp=2,dp=2,zero=1"]
    padded = [-(-elements // 32) * 32 for elements in sharded.script.unit_elements[0]]
    for record in sharded.records:
        assert record.sent_bytes["shard"] == {"reduce_scatter": 4 * sum(padded), "all_gather": 2 * sum(padded)}


@needs_namespaces
def test_parts_add_up_to_the_step_and_are_as_long_as_waits_and_links_make_them(found: dict[str, Rehearsal]) -> None:
    for rehearsal in found.values():
        assert tuple(rehearsal.parts_s) == PARTS
        assert sum(rehearsal.parts_s.values()) == pytest.approx(rehearsal.step_time_s)
        assert sum(rehearsal.predicted_s.values()) == pytest.approx(rehearsal.script.predicted.step_time_s)
        for part in ("compute", "update"):  # waits, which cannot be shorter and are hardly longer
            assert rehearsal.parts_s[part] == pytest.approx(rehearsal.predicted_s[part], rel=0.05)
        assert (
            rehearsal.parts_s["exposed_tp"] > 0.8 * rehearsal.predicted_s["exposed_tp"]
        )  # as fast as its port, at most
        assert 0.8 < rehearsal.step_time_s / rehearsal.script.predicted.step_time_s < 2


@needs_namespaces
def test_tensor_parallelism_across_the_slow_link_takes_longer_than_inside(found: dict[str, Rehearsal]) -> None:
    inside, across = found["tp=2,pp=2"], found["tp=2,pp=2,order=pp-cp-dp-tp"]
    assert across.parts_s["exposed_tp"] > 2 * inside.parts_s["exposed_tp"]
    assert across.parts_s["exposed_pp"] < inside.parts_s["exposed_pp"]


@needs_namespaces
def test_the_command_prints_one_document_and_leaves_nothing(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    options = ["--steps", "1", "--dilation", "5", "--json"]
    result = CliRunner().invoke(cli, ["rehearse", str(saved_plan(tmp_path)), *options], catch_exceptions=False)
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["layout"] == str(parse_layout("tp=2,pp=2"))  # the first that can run
    assert document["dilation"] == 5
    assert document["rehearsed_step_time_s"] == pytest.approx(sum(document["rehearsed_parts_s"].values()))
    assert document["relative_error"] == pytest.approx(
        document["predicted_step_time_s"] / document["rehearsed_step_time_s"] - 1
    )
    names = {process.name() for process in psutil.process_iter() if process.pid not in before}
    assert not names & {"cat", "unshare"}


@needs_namespaces
def test_nothing_is_left_of_a_killed_rehearsal(tmp_path: Path) -> None:
    options = ["--layout", "dp=4", "--dilation", "1000"]
    command = [sys.executable, "-m", "triaxial", "rehearse", str(saved_plan(tmp_path)), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        family: list[psutil.Process] = []
        while sum(in_a_network_of_its_own(process) for process in family) < 9:  # a switch, four nodes, four ranks
            assert killed.poll() is None
            time.sleep(0.1)
            family = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert len(gone) >= 9


def in_a_network_of_its_own(process: psutil.Process) -> bool:
    with suppress(OSError):
        return os.stat(f"/proc/{process.pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    return False


def fail_on_one(rank: int, say: Callable[[], None]) -> None:
    say()
    if rank == 1:
        raise ValueError("no such thing")
    time.sleep(600)  # as a rank does whose peer is gone


@needs_namespaces
def test_a_rank_that_fails_ends_all() -> None:
    with pytest.raises(NoAnswer, match="rank 1 of the rehearsal failed: ValueError: no such thing"):
        run_crew(fail_on_one, ["/proc/self/ns/net"] * 3, tell=lambda: None)
