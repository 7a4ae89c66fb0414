"""`triaxial export-hf`: a run's weights as a Hugging Face model folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress


@click.command(name="export-hf")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--dtype", help="float32, bfloat16, float16 or float64.  [default: the run's own]")
@click.option("--step", type=int, help="Of the checkpoint after so many steps.  [default: the newest]")
def command(run: Path, folder: Path, dtype: str | None, step: int | None) -> None:
    """Write the newest checkpoint of RUN to DIR, as transformers reads it: config, tokenizer and safetensors.

    Without --dtype, weights have the type of those that the run began from or, if it began from none, the type that
    it computed in.
    """
    from triaxial.train.description import FOLDER
    from triaxial.train.export import export_weights, open_checkpoint

    source, notes = open_checkpoint(run, step)
    for note in notes:
        click.echo(note, err=True)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("exporting", total=None)
        done = export_weights(
            run / FOLDER,
            source,
            folder,
            dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    click.echo(
        f"{folder}: {done.tensors} tensors in {done.dtype}, {done.bytes / 1e6:,.1f} MB in {done.files} "
        f"file{'s' * (done.files > 1)}, after step {source.manifest.step}"
    )
