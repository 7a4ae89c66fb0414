"""`triaxial serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from triaxial import BadInput

_ENOUGH = click.IntRange(min=1)


@click.command(name="serve")
@click.argument("model")
@click.option("--layout", default="tp=1", show_default=True, help="How to spread the model, like tp=2,pp=1,dp=2.")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", help="Clients must send it; others on this machine can see it here: prefer a file.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file that holds the key.")
@click.option("--max-model-len", type=_ENOUGH, help="Tokens of prompt and answer.  [default: the model's]")
@click.option("--max-prompt", type=_ENOUGH, help="Tokens of a prompt.  [default: all but one]")
@click.option("--max-batch", type=_ENOUGH, help="Sequences a replica decodes together.  [default: 64]")
@click.option("--max-queue", type=_ENOUGH, help="Sequences that may wait; then 429.  [default: 512]")
@click.option("--max-concurrent", type=_ENOUGH, help="Requests at the same time; then 429.  [default: 1024]")
@click.option("--max-body-bytes", type=_ENOUGH, help="Of a request; then 413.  [default: 8388608]")
@click.option("--request-timeout", type=float, help="Seconds for an answer; then 408.  [default: 600]")
@click.option("--drain-timeout", type=float, help="Seconds to finish requests after SIGTERM.  [default: 30]")
def command(api_key: str | None, api_key_file: Path | None, **flags: Any) -> None:
    """Serve MODEL, a Hugging Face folder, over HTTP as OpenAI does.

    dp replicas stand behind one address. The server listens on this machine only unless --host says otherwise.
    """
    from pydantic import ValidationError

    from triaxial.serve.process import ServeSettings, read_key, serve

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = ServeSettings(**given, api_key=read_key(api_key, api_key_file))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None
    serve(settings)
