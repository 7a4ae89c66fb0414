"""The rank processes of one replica: started together, watched, and ended together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from triaxial import BadInput
from triaxial.serve.request import EngineFailed
from triaxial.serve.settings import EngineSettings
from triaxial.serve.wire import frame

_WATCH_S = 0.5
_STOPPED_S = 2.0
"""A rank that has been stopped for so long counts as dead."""
_GRACE_S = 0.5
"""After the first sign of a failure, for the rank that caused it to be heard."""
LARGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296"
}
"""glibc's switches for large pages, and for keeping what a step has freed for the next: no page faults every step."""
_END_S = 3.0
"""That ranks have to end by themselves."""


@dataclass(frozen=True)
class Sign:
    """One rank's part in a failure."""

    rank: int
    words: str

    @property
    def order(self) -> int:
        """From cause to consequence: who waited in vain names the rank that hung, and had a cause before all others."""
        if "CommunicationError" in self.words:
            return 0 if "timed out" in self.words.lower() else 2
        return 1


class Ranks:
    """Processes, one a rank, each with a connection. `failed` holds the first cause once one of them is lost."""

    def __init__(self, settings: EngineSettings) -> None:
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._messages: asyncio.Queue[tuple[int, dict[str, Any]] | None] = asyncio.Queue()  # None: there will be none
        self._refused: str | None = None
        self._settings, self._size = settings, settings.parsed_layout.world_size
        self._folder = tempfile.TemporaryDirectory(prefix="triaxial-serve-")
        self._processes: list[asyncio.subprocess.Process] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._signs: list[Sign] = []
        self._outstanding_since: Callable[[], float | None] = lambda: None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    async def start(self, outstanding_since: Callable[[], float | None]) -> None:
        """Start all processes; `outstanding_since` says since when (monotonic) the oldest answer is waited for."""
        self._outstanding_since = outstanding_since
        for rank in range(self._size):
            await self._start(rank)
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _start(self, rank: int) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "triaxial.serve.worker",
                str(os.getpid()), str(rank), str(theirs.fileno()), str(Path(self._folder.name) / "store"),
                self._settings.model_dump_json(),
                pass_fds=(theirs.fileno(),), start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | LARGE_PAGES,
                stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=mine)
        self._processes.append(process)
        self._writers.append(writer)
        self._tasks.append(asyncio.create_task(self._listen(rank, process, reader)))

    def send(self, body: bytes) -> None:
        """The same frame to every rank."""
        framed = frame(body)
        for writer in self._writers:
            writer.write(framed)

    async def one_from_each(self) -> list[dict[str, Any]]:
        """Wait for one message of every rank, in rank order.

        Raises:
            EngineFailed: a rank was lost before.
            BadInput: a rank found that the model cannot be loaded.
        """
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < self._size:
            try:
                rank, message = await self.next_message()
            except EngineFailed:
                if self._refused is not None:
                    raise BadInput(self._refused) from None
                raise
            answers[rank] = message
        return [answers[rank] for rank in range(self._size)]

    async def next_message(self) -> tuple[int, dict[str, Any]]:
        """The next message of any rank.

        Raises:
            EngineFailed: a rank was lost.
        """
        message = await self._messages.get()
        if message is None:
            raise EngineFailed(self.failed.result())
        return message

    async def stop(self) -> None:
        """End every process: by closing its connection, and by force if it does not go."""
        if not self.failed.done():
            self._lose("the engine was stopped")
            for writer in self._writers:
                writer.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*(p.wait() for p in self._processes)), _END_S)
        self.kill()
        await asyncio.gather(*(p.wait() for p in self._processes))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folder.cleanup()

    def kill(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()

    async def _listen(self, rank: int, process: asyncio.subprocess.Process, reader: asyncio.StreamReader) -> None:
        assert process.stderr is not None
        printing = asyncio.create_task(_last_line(process.stderr))
        async for message in _messages(reader):
            if "failed" in message:
                self._refused = self._refused or message.get("refused")
                self._notice(Sign(rank, message["failed"]))
            else:
                self._messages.put_nowait((rank, message))
        code = await process.wait()
        last = await printing
        if code < 0:
            self._notice(Sign(rank, f"ended by {signal.Signals(-code).name}"))
        else:
            self._notice(Sign(rank, f"ended with exit code {code}" + (f" ({last})" if last else "")))

    async def _watch(self) -> None:
        """Notice what ends no connection: a stopped process, and a step that never comes back."""
        stopped_since: dict[int, float] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            for rank, process in enumerate(self._processes):
                if _is_stopped(process.pid):
                    since = stopped_since.setdefault(rank, now)
                    if now - since >= _STOPPED_S:
                        self._conclude(Sign(rank, f"stopped for {now - since:.0f} s (SIGSTOP)"))
                else:
                    stopped_since.pop(rank, None)
            oldest = self._outstanding_since()
            limit = self._settings.timeout_s + _STOPPED_S  # ranks' own time-outs name the culprit: they come first
            if oldest is not None and now - oldest > limit:
                self._conclude(Sign(-1, f"no rank answered within {limit:.0f} s"))

    def _notice(self, sign: Sign) -> None:
        if self.failed.done() or any(known.rank == sign.rank for known in self._signs):
            return
        self._signs.append(sign)
        if len(self._signs) == 1:
            asyncio.get_running_loop().call_later(
                _GRACE_S, lambda: self._conclude(min(self._signs, key=lambda s: s.order))
            )

    def _conclude(self, sign: Sign) -> None:
        """End every rank: the replica has failed for this cause."""
        if not self.failed.done():
            words = sign.words.removeprefix(f"CommunicationError: rank {sign.rank}: ").partition("\n")[0]
            self._lose(f"rank {sign.rank}: {words}" if sign.rank >= 0 else words)
            self.kill()

    def _lose(self, words: str) -> None:
        self.failed.set_result(words)
        self._messages.put_nowait(None)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            length = int.from_bytes(await reader.readexactly(4), "little")
            yield json.loads(await reader.readexactly(length))


async def _last_line(stream: asyncio.StreamReader) -> str:
    """Read a process's error output to its end; its last line."""
    tail = b""
    while part := await stream.read(1 << 16):
        tail = (tail + part)[-2000:]
    lines = tail.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _is_stopped(pid: int) -> bool:
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False
