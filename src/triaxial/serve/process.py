"""One server process from start to end: its port, its engines, its signals."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from triaxial import BadInput, NoAnswer
from triaxial.plan.layout import parse_layout
from triaxial.serve.engine import Engine
from triaxial.serve.limits import Limits
from triaxial.serve.metrics import Metrics
from triaxial.serve.replicas import Replicas
from triaxial.serve.request import EngineFailed
from triaxial.serve.served import Served
from triaxial.serve.server import House, build_app
from triaxial.serve.settings import EngineSettings, Precision, make_settings
from triaxial.serve.template import load_chat_template
from triaxial.serve.text import load_text_tokenizer

_POLL_S = 0.05
_KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none sends a request into one that we are closing."""


class ServeSettings(BaseModel):
    """Everything that `triaxial serve` is told. Times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    layout: str = "tp=1"
    precision: Precision = "bf16"
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    max_model_len: PositiveInt | None = None
    max_prompt: PositiveInt | None = None
    """Tokens; None leaves room for one more token."""
    max_batch: PositiveInt = 64
    max_queue: PositiveInt = Limits.max_queue
    max_concurrent: PositiveInt = Limits.max_concurrent
    max_body_bytes: PositiveInt = Limits.max_body_bytes
    request_timeout: PositiveFloat = Limits.timeout_s
    drain_timeout: PositiveFloat = 30.0
    """That running requests have to finish after SIGTERM."""

    @property
    def replicas(self) -> int:
        return parse_layout(self.layout).dp

    @property
    def engine(self) -> EngineSettings:
        """Of one replica; all of them share this machine's memory."""
        return make_settings(
            model=self.model,
            layout=str(replace(parse_layout(self.layout), dp=1)),
            precision=self.precision,
            max_batch=self.max_batch,
            max_model_len=self.max_model_len,
            memory_share=1 / self.replicas,
        )

    @property
    def name(self) -> str:
        """What clients call the model."""
        path = Path(self.model).resolve()
        return path.parent.name if path.name == "config.json" else path.name


def read_key(key: str | None, file: Path | None) -> str | None:
    """The API key, given as it is or in a file; None if there is none.

    Raises:
        BadInput: both, a file that cannot be read, or a key that no header can carry.
    """
    if key is not None and file is not None:
        raise BadInput("give --api-key or --api-key-file, not both")
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read the API key in {file}: {error}") from None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise BadInput("the API key must be printable ASCII without spaces around it, and not empty")
    return key


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests are finished first.

    Raises:
        BadInput: the model, the layout or the port cannot be used.
        NoAnswer: an engine does not start; names the rank and the cause.
    """
    try:
        asyncio.run(_serve(settings))
    except EngineFailed as error:
        raise NoAnswer(str(error)) from None
    except asyncio.CancelledError:  # a signal before the engines were ready
        return


async def _serve(settings: ServeSettings) -> None:
    began = time.monotonic()
    with _listening(settings.host, settings.port) as listener, _signals(_canceller()):
        served, metrics = _describe(settings), Metrics(settings.name)
        async with Replicas(lambda _: Engine(settings.engine), settings.replicas, metrics) as replicas:
            limits = Limits(
                max_queue=settings.max_queue,
                max_concurrent=settings.max_concurrent,
                max_body_bytes=settings.max_body_bytes,
                timeout_s=settings.request_timeout,
            )
            places = settings.max_batch * settings.replicas
            house = House(served, replicas, metrics, limits, places, settings.api_key)
            listener.listen()  # who connects from here on is answered
            host, port = listener.getsockname()[:2]
            print(
                f"serving {settings.name} ({settings.layout}) on http://{host}:{port}/v1, "
                f"ready after {time.monotonic() - began:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            await until_drained(house, listener, settings.drain_timeout)


def _describe(settings: ServeSettings) -> Served:
    spec = settings.engine.check()
    max_len, folder = settings.engine.model_len(spec), Path(settings.model)
    return Served(
        name=settings.name,
        vocab=spec.vocab,
        max_len=max_len,
        max_prompt=min(settings.max_prompt or max_len, max_len - 1),
        tokenizer=load_text_tokenizer(folder),
        template=load_chat_template(folder) if folder.is_dir() else None,
    )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The port, taken before anything is loaded; connections are accepted when the engines are ready."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadInput(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from None
        yield listener


@contextmanager
def _signals(handle: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _canceller() -> Callable[[], object]:
    task = asyncio.current_task()
    assert task is not None
    return task.cancel


async def until_drained(house: House, listener: socket.socket, drain_s: float) -> None:
    """Serve until a signal; then refuse what is new and finish what runs, within a bound. A second signal ends all."""
    config = uvicorn.Config(
        build_app(house), log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.Event()

    def on_signal() -> None:
        house.draining, again = True, asked.is_set()
        asked.set()
        server.should_exit = server.should_exit or again

    with _signals(on_signal):
        await asyncio.wait((serving, asyncio.create_task(asked.wait())), return_when=asyncio.FIRST_COMPLETED)
        deadline = time.monotonic() + drain_s
        while house.door.requests and time.monotonic() < deadline and not server.should_exit:
            await asyncio.sleep(_POLL_S)
        if house.door.requests:
            await house.replicas.end()
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """Leaves signals to us: to drain, it must go on answering."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
