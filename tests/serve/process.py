"""`triaxial serve` as a user runs it."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.command import TRIAXIAL
from tests.serve.live import HTTP

START_LIMIT_S = 120


class Server:
    """A running `triaxial serve` and what it says on standard error."""

    def __init__(self, model: Path, *arguments: str) -> None:
        command = [*TRIAXIAL, "serve", str(model), "--port", "0", "--precision", "fp32", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_LIMIT_S)
        found = re.search(r"on (http://\S+)/v1", self.said)
        assert found, self.said
        self.url = found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if line.startswith("serving "):
                self._ready.set()
        self._ready.set()

    @property
    def ranks(self) -> list[psutil.Process]:
        """In the order of their start: by replica, then by rank."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: (int(child.cmdline()[4]), child.pid))

    def health(self) -> int:
        return HTTP.get(self.url + "/health").status_code

    def metric(self, name: str, replica: int = 0) -> float:
        begin = f'{name}{{engine="{replica}"'
        lines = HTTP.get(self.url + "/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(begin)).split()[-1])

    def end(self, within_s: float = 30) -> int:
        """Exit code; no rank is left."""
        ranks = self.ranks
        try:
            code = self.process.wait(within_s)
            _, alive = psutil.wait_procs(ranks, timeout=5)
            assert not alive, alive
            self._reader.join(5)
            return code
        finally:
            for process in (*ranks, self.process):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[Server]:
    server = Server(model, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.end()
