"""Running the probe: on ranks started here, or as one rank of a torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from triaxial.cluster.spec import load_cluster, to_toml
from triaxial.files import require_writable, write_atomically
from triaxial.measure.probe import Probe, Tell, probe
from triaxial.measure.ranks import Node, run_ranks
from triaxial.plan.workload import Precision
from triaxial.train.trainer import Trainer  # noqa: F401  (what a training process holds includes its imports)
from triaxial.train.worker import end_with_parent


def run_probe(ranks: int | None, precisions: Sequence[Precision], out: Path, as_json: bool) -> Probe | None:
    """Measure and write `out`; None where another process has the answer.

    Raises:
        BadInput, NoAnswer: `out` cannot be written, or what a rank said.
    """
    require_writable(out)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _as_one_rank(precisions, out)
    arguments = ["probe", "--out", str(out), *(word for p in precisions for word in ("--precision", p))]
    run_ranks(Node(ranks=ranks or default_ranks()), arguments + (["--json"] if as_json else []))
    return None


def default_ranks() -> int:
    """One for each GPU, or each core."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def _as_one_rank(precisions: Sequence[Precision], out: Path) -> Probe | None:
    end_with_parent()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        with _progress(rank) as tell:
            found = probe(rank, device, tuple(precisions), tell)
    finally:
        dist.destroy_process_group()
    if rank:
        return None
    write_atomically(out, to_toml(found.cluster))
    load_cluster(out)
    return found


@contextmanager
def _progress(rank: int) -> Iterator[Tell]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = rank == 0 and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what: bar.update(task, description=what)
