"""A crew: processes of this machine that run one function, each as another rank."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from triaxial import NoAnswer

_ENTER_NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""

Job = Callable[..., Any]


def run_crew(job: Job, namespaces: list[str], *arguments: Any, tell: Callable[[], None]) -> list[Any]:
    """Run `job(rank, say, *arguments)`, each rank in a process in its own network namespace.

    All are forked from one process that has imported the job's module, so that they share its memory. They wait rather
    than compute, so they get real-time priority where that is permitted, and end with this process.

    Args:
        namespaces: of each rank, as files.
        tell: called whenever rank 0 calls `say()`.

    Returns:
        What the ranks return, in rank order.

    Raises:
        NoAnswer: a rank failed; says why.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([job.__module__])
    pipes = [context.Pipe(duplex=False) for _ in namespaces]
    crew = [
        context.Process(target=_serve, args=(job, rank, namespace, pipes[rank][1], arguments), daemon=True)
        for rank, namespace in enumerate(namespaces)
    ]
    try:
        for process, (_, theirs) in zip(crew, pipes, strict=True):
            process.start()
            theirs.close()
        return _collect([mine for mine, _ in pipes], tell)
    finally:
        for process in crew:
            if process.pid is not None:
                process.kill()
                process.join()


def _collect(connections: list[Connection], tell: Callable[[], None]) -> list[Any]:
    answers: dict[int, Any] = {}
    while waiting := [connection for rank, connection in enumerate(connections) if rank not in answers]:
        for ready in wait(waiting):
            assert isinstance(ready, Connection)
            rank = connections.index(ready)
            try:
                kind, value = ready.recv()
            except EOFError:
                raise NoAnswer(f"rank {rank} of the rehearsal ended without a word") from None
            if kind == "failed":
                raise NoAnswer(f"rank {rank} of the rehearsal failed: {value}")
            if kind == "done":
                answers[rank] = value
            else:
                tell()
    return [answers[rank] for rank in range(len(connections))]


def _serve(job: Job, rank: int, namespace: str, answer: Connection, arguments: tuple[Any, ...]) -> None:
    def say() -> None:
        if rank == 0:
            answer.send(("said", None))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with_reader, args=(answer,), daemon=True).start()
    try:
        _settle(namespace)
        answer.send(("done", job(rank, say, *arguments)))
    except Exception as error:
        answer.send(("failed", traceback.format_exception_only(error)[-1].strip()))


def _end_with_reader(answer: Connection) -> None:
    """End this process once nobody is left who would read what it has to say."""
    poll = select.poll()
    poll.register(answer, 0)  # errors only
    poll.poll()
    os._exit(1)


def _settle(namespace: str) -> None:
    """Wake up on time, and be in the namespace."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    kernel = ctypes.CDLL(None, use_errno=True)
    with open(namespace, "rb") as file:
        if kernel.setns(file.fileno(), _ENTER_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
