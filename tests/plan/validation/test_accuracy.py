"""Published points are read as they are meant, summarised fairly, and predicted as well as is claimed."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triaxial import BadInput
from triaxial.plan.validation.accuracy import by_source, constant_mfu, errors, kendall_tau, laboratory, predict, ranking
from triaxial.plan.validation.left_out import LEFT_OUT
from triaxial.plan.validation.practices import LLM_FOUNDRY, practice_of
from triaxial.plan.validation.published import read_points

SHIPPED = Path(str(resources.files("triaxial.plan.validation") / "published.csv"))
POINTS, SKIPPED = read_points(SHIPPED)
PREDICTED = predict(POINTS)


def rewritten(tmp_path: Path, **cells: str) -> Path:
    """The first shipped row with other cells."""
    with SHIPPED.open(newline="") as file:
        row = next(csv.DictReader(file))
    path = tmp_path / "points.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        writer.writeheader()
        writer.writerow({**row, **cells})
    return path


def test_the_shipped_set_names_its_sources_and_is_read_whole() -> None:
    with SHIPPED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] for row in rows)
    assert len(POINTS) + len(SKIPPED) == len(rows) >= 100
    assert len(SKIPPED) <= 5


def test_predictions_are_as_good_as_the_documentation_says() -> None:
    """Dense models on A100 and H100 in 16 bit: median within 8 %, nine in ten within 20 %."""
    dense = [
        p
        for p in PREDICTED
        if not p.point.model.experts
        and p.point.cluster.device.name.startswith(("A100", "H100"))
        and p.point.training.precision in ("bf16", "fp16")
    ]
    found = errors(dense)
    assert found.count >= 80
    assert found.median < 0.08
    assert found.p90 < 0.2
    assert errors(PREDICTED).median < 0.12
    assert found.median < errors(constant_mfu(dense)).median / 2


def test_layouts_of_one_job_are_put_in_the_measured_order() -> None:
    found = ranking(PREDICTED)
    assert found is not None
    assert found.tau > 0.6
    assert found.regret_worst < 0.1
    assert found.regret_median < found.random_regret


def test_empty_cells_mean_every_plausible_value(tmp_path: Path) -> None:
    (point,), _ = read_points(rewritten(tmp_path, id="new-001", micro_batch=""))
    assert {layout.mb for layout in point.layouts} == {1, 2, 4, 8}


def test_empty_cells_that_the_authors_fill_elsewhere_mean_that(tmp_path: Path) -> None:
    (point,), _ = read_points(rewritten(tmp_path, id="sc21t1-001", micro_batch="", vpp=""))
    assert {(layout.mb, layout.vpp) for layout in point.layouts} == {(16, 1)}


def test_layouts_are_compared_only_where_all_else_is_the_same(tmp_path: Path) -> None:
    """Two recipes of 8 bits are two programs, whatever their layouts."""
    jobs = {read_points(rewritten(tmp_path, precision=words))[0][0].job for words in ("fp8", "mxfp8", "fp8")}
    assert len(jobs) == 2


def test_sources_of_one_program_are_predicted_alike() -> None:
    assert practice_of("llmf-h100", "", 3, 1) == practice_of("llmf-a100", "", 3, 1) == LLM_FOUNDRY


def test_gradients_hide_where_pytorchs_own_data_parallelism_reduced_them() -> None:
    """examples/sc21/run_table_1.sh gives `--DDP-impl torch` to the rows of table 1 without a pipeline."""
    flat, piped = (practice_of("sc21t1", "", 0, pp) for pp in (1, 2))
    assert (flat.overlap_gradients, piped.overlap_gradients) == (True, False)
    assert flat.reduce_bytes == piped.reduce_bytes == 2, "fp16 gradients stay so unless a flag asks for fp32"


def test_repeats_of_a_configuration_count_once() -> None:
    once = errors(PREDICTED)
    assert errors([*PREDICTED, PREDICTED[0], PREDICTED[0]]) == once


def test_every_laboratory_was_left_out_once() -> None:
    assert {laboratory(point) for point in POINTS} <= set(LEFT_OUT)


def test_sources_partition_the_predictions() -> None:
    assert sum(len(group) for group in by_source(PREDICTED).values()) == len(PREDICTED)


@given(st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=8, unique=True))
def test_kendall_tau_is_one_for_the_same_order_and_minus_one_for_the_reverse(values: list[float]) -> None:
    assert kendall_tau(values, values) == 1
    assert kendall_tau(values, [-value for value in values]) == -1


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"step_time_s": ""}, "no step time"),
        ({"tp": "3"}, "GPUs"),
        ({"gpu": "A1000-SXM"}, "A1000-SXM"),
        ({"layers": "many"}, "invalid literal"),
        ({"precision": "fp64"}, ""),
    ],
)
def test_a_row_that_cannot_be_predicted_is_skipped_with_the_reason(
    tmp_path: Path, cells: dict[str, str], reason: str
) -> None:
    points, skipped = read_points(rewritten(tmp_path, **cells))
    assert len(points) + len(skipped) == 1
    if reason:
        assert reason in skipped[0].reason


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_file_that_is_no_table_of_points_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match="no table of training points"):
        read_points(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        read_points(tmp_path / "none.csv")
