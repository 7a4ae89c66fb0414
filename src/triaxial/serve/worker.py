"""Entry point of one rank: `python -m triaxial.serve.worker PARENT_PID RANK SOCKET STORE SETTINGS`."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from datetime import timedelta
from typing import Any

from triaxial import BadInput
from triaxial.serve.settings import EngineSettings, end_tokens
from triaxial.serve.wire import decode_step, receive_frame, send_message
from triaxial.train.worker import end_with_parent


def main() -> None:
    """Serve steps until the front closes the connection; a failure is told to it."""
    end_with_parent()
    parent, rank, handle, store, settings = sys.argv[1:]
    if os.getppid() != int(parent):  # it was gone before we could ask to end with it
        sys.exit(1)
    with socket.socket(fileno=int(handle)) as front:
        try:
            serve(front, int(rank), store, EngineSettings.model_validate_json(settings))
        except Exception as error:
            import traceback

            traceback.print_exc()
            refused = str(error) if isinstance(error, BadInput) else None
            send_message(front, {"failed": f"{type(error).__name__}: {error}", "refused": refused})
            sys.exit(1)


def serve(front: socket.socket, rank: int, store: str, settings: EngineSettings) -> None:
    """Join the other ranks, load this one's part, and run the steps that the front sends."""
    import torch
    import torch.distributed as dist

    from triaxial.parallel.mesh import build_mesh
    from triaxial.serve.runner import Runner
    from triaxial.serve.sampling import Sampler

    spec, layout = settings.check(), settings.parsed_layout
    torch.set_num_threads(settings.threads)
    device, timeout = _device(rank, torch), timedelta(seconds=settings.timeout_s)
    if device.type == "cpu":
        os.sched_setaffinity(0, own_cores(sorted(os.sched_getaffinity(0)), rank, layout.world_size, settings.threads))
    if layout.world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=layout.world_size, timeout=timeout
        )
    mesh = build_mesh(layout, rank, spec.num_kv_heads, device, timeout)
    runner = Runner(spec, settings, mesh, timeout)
    send_message(front, {"free": _free_bytes(device, layout.world_size), "block_bytes": runner.block_bytes})
    opening = receive_frame(front)
    if opening is None:
        return
    runner.open_cache(**json.loads(opening))
    samples = mesh.pp.index == mesh.pp.size - 1 and mesh.tp.index == 0
    sampler = Sampler(settings.max_batch, spec.vocab, end_tokens(settings.model), device) if samples else None
    gc.freeze()  # what is loaded stays: no step waits for a look through it
    send_message(front, {"ready": True})
    while (body := receive_frame(front)) is not None:
        step = decode_step(body)
        logits = runner.run(step)
        if sampler is not None and logits is not None:
            for state in step.states:
                sampler.learn(state)
            send_message(front, sampler.answer(logits, step))


def own_cores(cores: list[int], rank: int, ranks: int, threads: int) -> list[int]:
    """Of the cores that an engine may use, those that a rank keeps to: its own where ranks take them all, else any.

    Left alone, the kernel draws a rank that is woken to the core of the peer that wakes it, and may leave both there.
    """
    return cores[rank * threads :][:threads] if ranks * threads == len(cores) else cores


def _device(rank: int, torch: Any) -> Any:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _free_bytes(device: Any, ranks: int) -> int:
    """Memory that this rank could take: its device's, or its part of the host's."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // ranks


if __name__ == "__main__":
    main()
