"""Worker processes, started once, that run functions as the ranks of a fresh process group of any size."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 8


class World:
    """`run(n, function, *args)` calls `function(rank, *args)` on n ranks and returns their results in rank order."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._processes = []
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0
        for _ in range(LARGEST):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._runs += 1
        store = str(Path(self._folder.name) / f"store{self._runs}")
        for rank in range(size):
            self._pipes[rank].send((function, rank, size, store, args))
        answers = [self._pipes[rank].recv() for rank in range(size)]
        errors = [text for ok, text in answers if not ok]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
        self._folder.cleanup()


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        function, rank, size, store, args = task
        try:
            timeout = datetime.timedelta(seconds=120)
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout
            )
            try:
                pipe.send((True, function(rank, *args)))
            finally:
                dist.destroy_process_group()
                gc.collect()  # sockets and shared segments of this program go before the next one's come
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
