"""What a failed run says: which rank failed first and why, in one sentence, with the traceback in the run's folder."""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from triaxial import BadInput, NoAnswer
from triaxial.files import write_atomically
from triaxial.parallel.mesh import CommunicationError


@contextmanager
def reported(out: Path, rank: int) -> Iterator[None]:
    """Turn an exception of the rank in this process into NoAnswer, and leave its traceback in `out`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        report_failure(error, out, rank)
        raise NoAnswer(_sentence(out, rank, f"{type(error).__name__}: {error}")) from None


def report_failure(error: BaseException, out: Path, rank: int) -> None:
    """Tell torch's launcher, if there is one, what went wrong on this rank, and leave the traceback in `out`."""
    ErrorHandler().record_exception(error)
    if not isinstance(error, BadInput):
        with suppress(OSError, BadInput):  # what we report may be that the folder cannot be written to
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(_trace(out, rank), traceback.format_exc())
    if isinstance(error, CommunicationError):
        _wake_stopped_siblings()


def _wake_stopped_siblings() -> None:
    """A stopped process does not act on the SIGTERM that is coming, and torch's launcher would wait 30 s for it."""
    with suppress(psutil.Error):
        for sibling in psutil.Process(os.getppid()).children():
            sibling.send_signal(signal.SIGCONT)


def root_cause(failures: dict[int, ProcessFailure], out: Path) -> BadInput | NoAnswer:
    """The failure, of those by rank, that led to the others, in one sentence."""
    told = {rank: _words(failure) for rank, failure in failures.items()}
    rank = min(failures, key=lambda rank: (_order(told[rank]), failures[rank].timestamp, rank))
    kind, _, text = told[rank].partition(": ")
    return BadInput(text) if kind == BadInput.__name__ else NoAnswer(_sentence(out, rank, told[rank]))


def _order(words: str) -> int:
    """From cause to consequence: a rank that waited in vain shows that nobody had failed until then."""
    if words.startswith(CommunicationError.__name__):
        return 0 if "timed out" in words.lower() else 2
    return 3 if words.endswith(signal.SIGTERM.name) else 1


def _words(failure: ProcessFailure) -> str:
    """What the rank reported, which is `Type: text` of its exception, or how its process ended."""
    report: Any = failure.error_file_data.get("message", {})
    words = report.get("message") if isinstance(report, dict) else None
    if words is None and failure.exitcode < 0:
        return f"ended by {signal.Signals(-failure.exitcode).name}"
    return str(words or f"ended with exit code {failure.exitcode}")


def _sentence(out: Path, rank: int, words: str) -> str:
    cause = words.removeprefix(f"{CommunicationError.__name__}: rank {rank}: ").partition("\n")[0]
    cause = re.sub(r"\[\S+:\d+\] ", "", cause)  # the place in Gloo's source
    trace = _trace(out, rank)
    return f"rank {rank} failed: {cause}" + (f" (traceback in {trace})" if trace.exists() else "")


def _trace(out: Path, rank: int) -> Path:
    return out / f"failure-rank{rank}.txt"
