"""Network namespaces of one machine, joined by a switch: what the lab and the fabric of a rehearsal are built of.

Every namespace belongs to a small process that waits for the end of its input, and nothing in the machine's own
namespace is touched. So the kernel takes all of it away when this process ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from triaxial import BadInput

_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}


def require_namespaces() -> None:
    """Refuse a machine on which the lab cannot be built.

    Raises:
        BadInput: says what is missing.
    """
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise BadInput(f"the lab needs Linux's network namespaces: install {' and '.join(missing)}")
    if os.geteuid() != 0:
        raise BadInput("the lab builds network namespaces, which only root may: run it with sudo")
    allowed = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    if allowed.returncode:
        raise BadInput(f"this machine permits no network namespaces: {allowed.stderr.strip()}")


class Namespace:
    """A network namespace that lives as long as its process, which ends when this one does."""

    def __enter__(self) -> Namespace:
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(b"ready\n")
        self._keeper.stdin.flush()
        if not self._keeper.stdout.readline():  # comes back once `cat` runs, which is after the namespace is there
            raise BadInput("this machine permits no network namespaces")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keeper.kill()
        self._keeper.wait()

    @property
    def pid(self) -> int:
        return self._keeper.pid

    @property
    def enter(self) -> list[str]:
        """What to write before a command to run it inside."""
        return ["nsenter", f"--net={self.path}"]

    @property
    def path(self) -> str:
        """The namespace as a file."""
        return f"/proc/{self.pid}/ns/net"

    def run(self, *command: str, given: str = "") -> None:
        """Run a command inside, with `given` as its input."""
        done = subprocess.run([*self.enter, *command], input=given, capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"this machine cannot build the lab: {' '.join(command)}: {done.stderr.strip()}")


class Switched(ABC):
    """So many namespaces and one for the switch between them, which exist while the context is open."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.namespaces: list[Namespace] = []
        self._open = ExitStack()

    @abstractmethod
    def connect(self, switch: Namespace) -> None:
        """Join the namespaces through the switch's."""

    def __enter__(self) -> Self:
        """Build the cluster.

        Raises:
            BadInput: not Linux, not root, a missing tool, or a machine that permits no network namespaces.
        """
        require_namespaces()
        with ExitStack() as building:
            switch = building.enter_context(Namespace())
            self.namespaces = [building.enter_context(Namespace()) for _ in range(self.count)]
            self.connect(switch)
            self._open = building.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def address(self, index: int) -> str:
        """A namespace's address on the links between them."""
        return f"10.77.{index // 254}.{index % 254 + 1}"
