"""However a run fails, it ends within seconds, says which rank failed and why, and leaves no process behind."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.command import SEQ, Workplace
from triaxial.train.corpus import build_corpus
from triaxial.train.order import sample_indices
from triaxial.train.tokenizer import ByteTokenizer

SECONDS = 20.0
"""Within seconds, on a machine that may be busy with other things."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("place"))


def test_a_killed_rank_ends_all_and_is_named(place: Workplace) -> None:
    run = place.start("killed", "--layout", "tp=2,pp=2").wait_for_steps()
    assert sorted(run.ranks) == [0, 1, 2, 3]
    run.ranks[2].kill()
    code, lines = run.end(SECONDS)
    assert (code, lines) == (1, ["triaxial: rank 2 failed: ended by SIGKILL"])


def test_an_exception_on_one_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    """A token file cut short: the last training sample is not there, and the order says whose turn it is."""
    place, batch = Workplace(tmp_path), 4
    corpus = build_corpus(place.folder / "data", ByteTokenizer(), place.cache / "triaxial" / "corpora")
    samples = len(corpus.split(SEQ)[0])
    (tokens,) = place.cache.rglob("tokens.bin")
    with tokens.open("r+b") as file:
        file.truncate(((samples - 1) * SEQ + 1) * 2)  # of 16 bits; the sample before needs one for its label
    for seed in range(100):  # until the sample comes to rank 1, which has the second half of each batch, at step 2
        if samples - 1 in sample_indices(2, batch, samples, seed)[batch // 2 :]:
            break
    run = place.start("raised", "--layout", "dp=2", "--global-batch", str(batch), "--seed", str(seed))
    code, (line,) = run.end(150)
    assert code == 1
    assert re.fullmatch(
        r"triaxial: rank 1 failed: IndexError: index \d+ is out of bounds for axis 0 with size \d+ "
        r"\(traceback in raised/failure-rank1\.txt\)",
        line,
    )
    trace = (run.out / "failure-rank1.txt").read_text()
    assert trace.startswith("Traceback (most recent call last):")
    assert "in batch\n" in trace
    assert (run.out / "metrics.jsonl").read_text().count("\n") == 2


def test_an_exception_without_other_ranks_reads_the_same(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    build_corpus(place.folder / "data", ByteTokenizer(), place.cache / "triaxial" / "corpora")
    (tokens,) = place.cache.rglob("tokens.bin")
    with tokens.open("r+b") as file:
        file.truncate(SEQ)
    done = place.train("--steps", "3", "--out", "raised")
    assert done.returncode == 1
    assert re.fullmatch(
        r"triaxial: rank 0 failed: IndexError: index \d+ .*\(traceback in raised/failure-rank0\.txt\)\n", done.stderr
    )


def test_a_rank_that_hangs_ends_all_after_the_timeout_and_the_operation_is_named(place: Workplace) -> None:
    run = place.start("hung", "--layout", "tp=2", "--timeout", "8").wait_for_steps()
    run.ranks[1].suspend()
    code, (line,) = run.end(8 + SECONDS)
    assert code == 1
    assert line.startswith("triaxial: rank 0 failed: all_")
    assert "over tp (ranks [0, 1]) failed: timed out after 8 s waiting for rank 1" in line
    assert line.endswith("(traceback in hung/failure-rank0.txt)")


def test_ctrl_c_ends_all_ranks(place: Workplace) -> None:
    run = place.start("interrupted", "--layout", "pp=2").wait_for_steps()
    run.press_ctrl_c()
    assert run.end(SECONDS) == (130, ["triaxial: interrupted"])


def test_ctrl_c_ends_ranks_that_still_load(place: Workplace) -> None:
    run = place.start("interrupted-early", "--layout", "tp=2").wait_for_ranks(2)
    run.press_ctrl_c()
    assert run.end(SECONDS) == (130, ["triaxial: interrupted"])
    assert not run.out.exists()


def test_sigterm_to_the_launcher_ends_all_ranks(place: Workplace) -> None:
    run = place.start("terminated", "--layout", "dp=2", "--zero", "2").wait_for_steps()
    run.signal(signal.SIGTERM)
    assert run.end(SECONDS) == (1, ["triaxial: ended by SIGTERM"])


def test_ranks_do_not_outlive_a_killed_launcher(place: Workplace) -> None:
    run = place.start("orphaned", "--layout", "tp=2").wait_for_steps()
    run.signal(signal.SIGKILL)
    assert run.end(SECONDS) == (-signal.SIGKILL, [])


def test_ranks_that_still_load_do_not_outlive_a_killed_launcher(place: Workplace) -> None:
    run = place.start("orphaned-early", "--layout", "tp=2").wait_for_ranks(2)
    run.signal(signal.SIGKILL)
    assert run.end(SECONDS) == (-signal.SIGKILL, [])
