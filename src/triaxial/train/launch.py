"""Starting the ranks of a run: in this process, as local processes, or inside an existing torchrun."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from triaxial import BadInput, Ended
from triaxial.model.spec import load_model_spec
from triaxial.train.config import TrainConfig
from triaxial.train.corpus import Corpus, build_corpus
from triaxial.train.elastic import fit_to_world
from triaxial.train.failure import reported, root_cause
from triaxial.train.tokenizer import load_tokenizer
from triaxial.train.trainer import Place, Trainer

_SHUTDOWN_S = 5
"""That ranks have to end when they are asked to, before they are killed."""


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


def launch(config: TrainConfig) -> bool:
    """Train: join the torchrun that this process is part of, or start the layout's ranks on this machine.

    Returns:
        Whether this process speaks for the run: under torchrun rank 0 alone does.

    Raises:
        BadInput: the data does not fit, or the world is not of the layout's size.
        NoAnswer: a rank failed; names the rank and the cause. No process is left behind.
    """
    world = config.parsed_layout.world_size
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _join_torchrun(config, world)
    check_data(config, open_corpus(config))
    if world == 1:
        with reported(config.out, 0):
            train_here(config)
    else:
        _start_local_ranks(config, world)
    return True


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


def _join_torchrun(config: TrainConfig, world: int) -> bool:
    given, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if config.elastic:
        nodes, ranks_per_node = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        config = fit_to_world(config, given, nodes, ranks_per_node)
        if rank == 0:
            print(f"{given} ranks: {config.layout}", file=sys.stderr, flush=True)
    elif given != world:
        raise BadInput(f"layout {config.layout} has {world} ranks and torchrun started {given}")
    with reported(config.out, rank):
        work(config)
    return rank == 0


def _start_local_ranks(config: TrainConfig, world: int) -> None:
    endpoint = f"127.0.0.1:{_usable_port(config.port)}"
    arguments = ("-m", "triaxial.train.worker", str(os.getpid()), config.model_dump_json())
    with tempfile.TemporaryDirectory(prefix="triaxial-") as folder, _quiet():
        launch_config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id="triaxial",
            rdzv_endpoint=endpoint,
            rdzv_backend="c10d",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # Ctrl-C stays Python's: its ranks then end by SIGTERM
            shutdown_timeout=_SHUTDOWN_S,
        )
        try:
            elastic_launch(launch_config, sys.executable)(*arguments)
        except ChildFailedError as error:
            raise root_cause(error.failures, config.out) from None
        except SignalException as error:
            raise Ended(f"ended by {error.sigval.name}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's launcher from logging what our one sentence says; leave a usable terminal behind rank 0's bar."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    except BaseException:
        if sys.stderr.isatty():
            Console(stderr=True).show_cursor()
            print(file=sys.stderr)
        raise
    finally:
        logging.disable(logging.NOTSET)


def _usable_port(port: int) -> int:
    if port:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise BadInput(f"port {port} cannot be used ({error.strerror}): choose another --port") from None
    return port


def work(config: TrainConfig) -> None:
    """One rank of a run that torch's launcher started."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    local_world = int(os.environ["LOCAL_WORLD_SIZE"])
    device = _device(local_rank)
    torch.set_num_threads(max(1, _usable_cores() // local_world))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=config.timeout))
    try:
        Trainer(config, open_corpus(config), Place(rank, device)).run()
    finally:
        dist.destroy_process_group()


def _usable_cores() -> int:
    """Those that a scheduler has given to this process, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
