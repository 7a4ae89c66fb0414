"""Traffic is what was asked for: lengths, rates, and what files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triaxial import BadInput
from triaxial.plan.serving.demand import demand_for
from triaxial.plan.serving.traces import read_lengths, read_trace
from triaxial.plan.serving.traffic import Fixed, LogNormal, at_once, draw_lengths, parse_lengths, poisson


def test_lengths_are_read_as_people_write_them() -> None:
    assert parse_lengths("input", "1024") == Fixed(1024)
    assert parse_lengths("input", "lognormal:1024:0.5") == LogNormal(1024, 0.5)


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1.5", "normal:3:1", "lognormal:10", "lognormal:nan:1", "lognormal:8:9"]
)
def test_other_lengths_are_refused_by_name(text: str) -> None:
    with pytest.raises(BadInput, match=r"--output .* is no length"):
        parse_lengths("output", text)


def test_log_normal_lengths_have_the_mean_and_spread_asked_for() -> None:
    drawn = LogNormal(700, 0.6).draw(40_000, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(700, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.6, rel=0.02)
    assert LogNormal(1, 2.0).draw(1000, np.random.default_rng(1)).min() == 1


def test_poisson_arrivals_come_at_the_rate_and_without_memory() -> None:
    inputs, outputs = draw_lengths(Fixed(10), Fixed(5), 40_000)
    traffic = poisson(inputs, outputs, 8.0, seed=3)
    gaps = np.diff(traffic.arrival_s)
    assert traffic.rate == pytest.approx(8.0, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.02)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0.0, abs=0.02)


def test_a_higher_rate_gives_the_same_requests_closer_together() -> None:
    lengths = draw_lengths(LogNormal(50, 1.0), LogNormal(50, 1.0), 100)
    slow, fast = poisson(*lengths, 1.0), poisson(*lengths, 4.0)
    assert fast.arrival_s == pytest.approx(slow.arrival_s / 4)
    assert slow.at_rate(2.5).rate == pytest.approx(2.5)
    more = draw_lengths(LogNormal(50, 1.0), LogNormal(50, 1.0), 200)
    assert (more[0][:100] == lengths[0]).all()
    assert (more[1][:100] == lengths[1]).all()


def test_what_comes_all_at_once_has_no_rate() -> None:
    traffic = at_once(*draw_lengths(Fixed(3), Fixed(4), 5))
    assert traffic.rate is None
    with pytest.raises(BadInput, match="no rate"):
        traffic.at_rate(2.0)


TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n4.0,30,3\n2.0,10,1\n3.5,20,2\n"


def test_a_trace_is_read_sorted_and_from_its_first_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    traffic = read_trace(path)
    assert traffic.arrival_s.tolist() == [0.0, 1.5, 2.0]
    assert traffic.input_tokens.tolist() == [10, 20, 30]
    assert traffic.output_tokens.tolist() == [1, 2, 3]
    path.write_text("request,arrival_s,input_tokens,output_tokens\nx,0,7,8\n")
    assert read_trace(path).input_tokens.tolist() == [7]


def test_lengths_of_a_file_go_round(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"input_tokens": 5, "output_tokens": 6, "user": "x"}\n{"input_tokens": 7, "output_tokens": 8}\n')
    inputs, outputs = read_lengths(path, 5)
    assert inputs.tolist() == [5, 7, 5, 7, 5]
    assert outputs.tolist() == [6, 8, 6, 8, 6]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TRACE + "oops,1,1\n", "line 5: arrived_at"),
        (TRACE.replace("10,1", "10,0"), "line 3: num_decode_tokens"),
        (TRACE.replace("4.0,30", "-1,30"), "line 2: arrived_at"),
        (TRACE.replace("4.0,30", "inf,30"), "line 2: arrived_at"),
        ("arrival_s,input_tokens\n1,2\n", "line 2: output_tokens"),
        (TRACE.splitlines()[0], "holds no requests"),
    ],
)
def test_a_bad_trace_names_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=says):
        read_trace(path)


def test_bad_files_of_lengths_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"input_tokens": 5, "output_tokens": 6}\n{"input_tokens"\n')
    with pytest.raises(BadInput, match="line 2: not JSON"):
        read_lengths(path, 3)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="no text file"):
        read_lengths(path, 3)
    with pytest.raises(BadInput, match="cannot read"):
        read_lengths(tmp_path / "missing.jsonl", 3)


def test_a_demand_takes_its_lengths_from_one_place(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    demand = demand_for(trace=path, rate=3.0)
    assert demand.recorded
    assert demand.rate == demand.traffic.rate == pytest.approx(3.0)
    assert demand.longest == 33
    assert demand_for(trace=path, requests=2).rate == pytest.approx(2 / 1.5)
    for wrong in ({"trace": path, "input_len": "5"}, {}, {"lengths": path, "trace": path}):
        with pytest.raises(BadInput, match="in one way"):
            demand_for(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="--output is missing"):
        demand_for(input_len="5")
    with pytest.raises(BadInput, match="--rate must be more than zero"):
        demand_for(input_len="5", output_len="5", rate=0.0)
    path.write_text("arrival_s,input_tokens,output_tokens\n0,7,8\n0,7,8\n")
    with pytest.raises(BadInput, match="at once"):
        demand_for(trace=path)
