"""Starting one node's ranks of a command, whether the node is this machine or one of the lab's."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from triaxial import BadInput, Ended, NoAnswer

_SHUTDOWN_S = 5
"""That ranks have to end when they are asked to, before they are killed."""


class Node(BaseModel):
    """What a launcher must know of the job and of its own node."""

    ranks: int
    """Processes here."""
    nodes: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    rendezvous: str = "127.0.0.1:0"

    @property
    def speaks(self) -> bool:
        """Whether the job's rank 0 is here, which is the one whose words are shown."""
        return self.index == 0


def run_ranks(node: Node, arguments: Sequence[str]) -> None:
    """Run `triaxial ARGUMENTS` as this node's ranks and wait for them.

    Raises:
        BadInput, NoAnswer: a rank failed, with what it said; rank 0 has said it itself. Or a signal ended it all.
    """
    with tempfile.TemporaryDirectory(prefix="triaxial-") as folder, _quiet():
        try:
            elastic_launch(_config(node, folder), sys.executable)("-m", "triaxial", *arguments)
        except ChildFailedError as error:
            raise _failure(node, error, Path(folder)) from None
        except SignalException as error:
            raise Ended(f"ended by {error.sigval.name}") from None
        except RendezvousError:
            raise NoAnswer("the launcher of the first node is gone") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own account of a failure: ours is one sentence."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _config(node: Node, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=node.ranks,
        run_id="triaxial",
        rdzv_endpoint=node.rendezvous,
        rdzv_backend="c10d",
        rdzv_configs={"is_host": node.speaks},
        local_addr=node.address,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # Ctrl-C stays Python's: its ranks then end by SIGTERM
        shutdown_timeout=_SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(
            log_dir=folder, redirects={rank: Std.ALL for rank in range(node.ranks) if rank or not node.speaks}
        ),
    )


def _failure(node: Node, error: ChildFailedError, folder: Path) -> BadInput | NoAnswer:
    """What the rank said that failed first; of several, rank 0's word goes for all."""
    _, first = error.get_first_failure()
    kind = BadInput if first.exitcode == 2 else NoAnswer
    if node.speaks and any(failure.local_rank == 0 and failure.exitcode > 0 for failure in error.failures.values()):
        return kind("the job failed")
    return kind(_last_words(folder, first).removeprefix("triaxial: "))


def _last_words(folder: Path, failure: ProcessFailure) -> str:
    for log in folder.rglob(f"{failure.local_rank}/stderr.log"):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    ended = f"ended by {failure.signal_name()}" if failure.exitcode < 0 else "failed without a word"
    return f"rank {failure.local_rank} of this node {ended}"
