"""What stands before the engine: seconds of a processor that `triaxial serve` takes beside its engine's steps.

A server of a model of random weights, large enough that its steps leave the processors' caches to the weights, streams
answers to one client and to several; the clock is the server process's own processor time.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import psutil

from triaxial import NoAnswer
from triaxial.cluster.timings import ServerTimings
from triaxial.model.spec import read_description

_MODEL = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
ANSWER_TOKENS = 65
"""Of a long answer: as many steps follow its first token as make one less."""
_PROMPT = [1] * 16
_END_S = 30
"""For the server to end."""
_ROUNDS = 4
"""Of requests for one token, whose seconds are few beside what the clock counts in."""


def server_timings(precision: str, clients: int, step_s: float, sequence_s: float) -> ServerTimings | None:
    """Of a server asked by one client and by `clients` at a time; None where it is not installed.

    Args:
        step_s, sequence_s: what of it is the engine's own, for a step and for a sequence in it.

    Raises:
        NoAnswer: the server does not start.
    """
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn")):
        return None
    with _server(precision, clients) as (process, port):
        _answers(process, port, clients, 4)  # warm
        first = sum(_answers(process, port, clients, 1) for _ in range(_ROUNDS)) / (_ROUNDS * clients)
        one, together = _answers(process, port, 1, ANSWER_TOKENS), _answers(process, port, clients, ANSWER_TOKENS)
    return processor_seconds(first, one, together, clients).beyond(step_s, sequence_s)


def processor_seconds(first: float, one: float, together: float, clients: int) -> ServerTimings:
    """Of one side of a connection, from its seconds for a request up to its first token, and for one and for `clients`
    requests at a time with `ANSWER_TOKENS` tokens each, which come in steps that these requests share."""
    steps = ANSWER_TOKENS - 1
    alone, shared = (one - first) / steps, (together - clients * first) / steps
    sequence_s = max(0.0, (shared - alone) / (clients - 1))
    return ServerTimings(request_s=first, step_s=max(0.0, alone - sequence_s), sequence_s=sequence_s)


@contextmanager
def _server(precision: str, clients: int) -> Iterator[tuple[psutil.Process, int]]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(read_description("tiny-byte") | _MODEL))
        command = [sys.executable, "-m", "triaxial", "serve", str(config), "--port", "0"]
        command += ["--precision", precision, "--max-batch", str(clients)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            words = ""
            while not (found := re.search(r"on http://\S+:(\d+)/v1", words)):
                words = process.stderr.readline()
                if not words:
                    raise NoAnswer(f"measuring the server failed: it ended with code {process.wait()}")
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=_END_S)
            finally:
                process.kill()


def _answers(process: psutil.Process, port: int, clients: int, tokens: int) -> float:
    """Processor seconds of the server for an answer to every client at the same time."""
    before = process.cpu_times()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(lambda _: _ask(port, tokens), range(clients)))
    after = process.cpu_times()
    return float(after.user + after.system - before.user - before.system)


def _ask(port: int, tokens: int) -> None:
    body = {"prompt": _PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise NoAnswer(f"measuring the server failed: it answered {response.status}")
        for _ in response:
            pass
    finally:
        connection.close()
