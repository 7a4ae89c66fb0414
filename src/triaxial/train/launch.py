"""Starting the ranks of a run: in this process, as local processes, or inside an existing torchrun."""

from __future__ import annotations

import ctypes
import datetime
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from triaxial import BadInput, NoAnswer
from triaxial.files import write_atomically
from triaxial.model.spec import load_model_spec
from triaxial.parallel.mesh import CommunicationError
from triaxial.train.config import TrainConfig
from triaxial.train.corpus import Corpus, build_corpus
from triaxial.train.tokenizer import load_tokenizer
from triaxial.train.trainer import Place, Trainer

_PR_SET_PDEATHSIG = 1


def open_corpus(config: TrainConfig) -> Corpus:
    """The run's tokens, made now unless they exist.

    Raises:
        BadInput: no text, too little of it, or a tokenizer that does not fit.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "triaxial" / "corpora"
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokenizing", total=None)
        return build_corpus(
            config.data,
            load_tokenizer(config.tokenizer),
            cache,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def launch(config: TrainConfig) -> None:
    """Train: join the torchrun that this process is part of, or start the layout's ranks on this machine.

    Raises:
        BadInput: the data does not fit, or the world is not of the layout's size.
        NoAnswer: a rank failed; names the rank and the cause. No process is left behind.
    """
    world = config.parsed_layout.world_size
    if "TORCHELASTIC_RUN_ID" in os.environ:
        given = int(os.environ["WORLD_SIZE"])
        if given != world:
            raise BadInput(f"layout {config.layout} has {world} ranks and torchrun started {given}")
        work(config)
        return
    check_data(config, open_corpus(config))
    if world == 1:
        train_here(config)
    else:
        _start_local_ranks(config, world)


def check_data(config: TrainConfig, corpus: Corpus) -> None:
    """Refuse data that the model cannot be trained on, before any process starts.

    Raises:
        BadInput: names what does not fit.
    """
    corpus.require_vocab(load_model_spec(config.model).vocab)
    corpus.split(config.seq_len, config.held_out)


def train_here(config: TrainConfig) -> Trainer:
    """Train in this process alone."""
    trainer = Trainer(config, open_corpus(config), Place(device=_device(0)))
    trainer.run()
    return trainer


def _start_local_ranks(config: TrainConfig, world: int) -> None:
    endpoint = f"127.0.0.1:{_usable_port(config.port)}"
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id="triaxial",
        rdzv_endpoint=endpoint,
        rdzv_backend="c10d",
        max_restarts=0,
        monitor_interval=0.1,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our one sentence says it all
    try:
        elastic_launch(launch_config, sys.executable)("-m", "triaxial.train.worker", config.model_dump_json())
    except ChildFailedError as error:
        rank, cause = _root_cause(error.failures)
        trace = config.out / f"failure-rank{rank}.txt"
        where = f" (traceback in {trace})" if trace.exists() else ""
        raise NoAnswer(f"rank {rank} failed: {cause}{where}") from None


def _usable_port(port: int) -> int:
    if port:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise BadInput(f"port {port} cannot be used ({error.strerror}): choose another --port") from None
    return port


def _root_cause(failures: dict[int, ProcessFailure]) -> tuple[int, str]:
    """Rank and words of the failure that came first, but for ranks that only report that another fell silent."""
    told = {rank: _describe(failure) for rank, failure in failures.items()}
    rank = min(failures, key=lambda rank: (_is_consequence(told[rank]), failures[rank].timestamp))
    return rank, told[rank]


def _describe(failure: ProcessFailure) -> str:
    report: Any = failure.error_file_data.get("message", {})
    words = report.get("message") if isinstance(report, dict) else None
    if words is None and failure.exitcode < 0:
        return f"ended by {signal.Signals(-failure.exitcode).name}"
    return str(words or f"ended with exit code {failure.exitcode}")


def _is_consequence(words: str) -> bool:
    return CommunicationError.__name__ in words or words.endswith(signal.SIGTERM.name)


def report_failure(error: BaseException, config: TrainConfig) -> None:
    """Tell the launcher what went wrong on this rank, and leave the traceback in the run's folder."""
    ErrorHandler().record_exception(error)
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / f"failure-rank{os.environ['RANK']}.txt", traceback.format_exc())


def work(config: TrainConfig) -> None:
    """One rank of a run that torch's launcher started."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    local_world = int(os.environ["LOCAL_WORLD_SIZE"])
    _die_with_the_launcher()
    device = _device(local_rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=config.timeout))
    try:
        Trainer(config, open_corpus(config), Place(rank, device)).run()
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _die_with_the_launcher() -> None:
    """Ctrl-C reaches the launcher, which ends its ranks; if the launcher itself is killed, the kernel does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    prctl: Callable[..., int] | None = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
