"""Entry point of one rank that `launch` started: `python -m triaxial.train.worker LAUNCHER_PID SETTINGS`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Train as one rank; a failure is reported to the launcher instead of being printed by every rank."""
    end_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it was gone before we could ask to end with it
        sys.exit(1)
    # Only now: importing torch takes seconds in which the launcher may be killed.
    from triaxial.train.config import TrainConfig
    from triaxial.train.failure import report_failure
    from triaxial.train.launch import work

    config = TrainConfig.model_validate_json(sys.argv[2])
    try:
        work(config)
    except Exception as error:
        report_failure(error, config.out, int(os.environ["RANK"]))
        sys.exit(1)


def end_with_torchrun() -> None:
    """As `end_with_parent`, in a process that torchrun started; to be called before torch is imported."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """A signal to the launcher ends its ranks through it; if it is killed itself, the kernel ends them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for a collective to end
    prctl: Callable[..., int] | None = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
