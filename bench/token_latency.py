"""Seconds per token of one sequence: tensor parallelism reads every weight on all ranks at once, a pipeline in turn.

    triaxial probe --ranks 2
    python bench/token_latency.py [--cluster cluster.toml] [--markdown FILE] [--svg FILE]

One client asks Triaxial's own engine under tp=2 and under pp=2, predicted beside measured, for models of several widths.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import click
import torch

from triaxial.cluster.spec import load_cluster
from triaxial.files import write_atomically
from triaxial.measure.bench import Bench
from triaxial.measure.bench_serving import ServingComparison, bench_serving
from triaxial.plan.layout import Layout
from triaxial.plan.serving.estimate import ServingEstimate
from triaxial.plan.serving.workload import Serving
from triaxial.report.bars import stacked_bars

WIDTHS = (256, 512, 1024)
LAYERS = 8
LAYOUTS = {"tp=2": Layout(tp=2), "pp=2": Layout(pp=2)}
WORK = Serving(input_len=128, output_len=32, concurrency=1)
ROUNDS = 3


@dataclass(frozen=True)
class Width:
    """Both layouts of a model of one width."""

    hidden: int
    found: dict[str, ServingComparison]

    def tpot_ms(self, layout: str, side: str) -> float:
        return 1e3 * float(getattr(self.found[layout], side).tpot_s)

    def ratio(self, side: str) -> float:
        """TP's seconds over PP's."""
        return self.tpot_ms("tp=2", side) / self.tpot_ms("pp=2", side)


def config(hidden: int) -> dict[str, object]:
    """A model of eight layers in the proportions of Llama 3."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(2, hidden // 256),
        "intermediate_size": hidden * 7 // 2,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }


def measure(folder: Path, cluster: str) -> list[Width]:
    rows = []
    for hidden in WIDTHS:
        path = folder / f"hidden-{hidden}.json"
        path.write_text(json.dumps(config(hidden)))
        bench: Bench[ServingEstimate, ServingComparison] = bench_serving(
            str(path), load_cluster(cluster), WORK, list(LAYOUTS.values()), rounds=ROUNDS,
            tell=lambda layout, hidden=hidden: click.echo(f"hidden {hidden}: {layout}", err=True),  # type: ignore[misc]
        )  # fmt: skip
        if failed := [row.failure for row in bench.rows if row.failure]:
            raise SystemExit(failed[0])
        rows.append(Width(hidden, dict(zip(LAYOUTS, bench.measured, strict=True))))
    return rows


def markdown(rows: Sequence[Width]) -> str:
    lines = [
        "## TP's latency per token is below PP's at batch 1",
        "",
        f"`python bench/token_latency.py` on {date.today():%Y-%m-%d}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"torch {torch.__version__}. Models of {LAYERS} layers in {WORK.precision}, prompts of {WORK.input_len} tokens, "
        f"answers of about {WORK.output_len}, one client. Milliseconds per token after the first, measured (predicted).",
        "",
        "| hidden | tp=2 | pp=2 | tp / pp |",
        "|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row.tpot_ms(name, 'measured'):.2f} ({row.tpot_ms(name, 'predicted'):.2f})" for name in LAYOUTS]
        lines.append(
            f"| {row.hidden} | {' | '.join(cells)} | {row.ratio('measured'):.2f} ({row.ratio('predicted'):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Width]) -> str:
    bars = [
        (f"hidden {row.hidden}, {name}, {side}", {"per token": row.tpot_ms(name, side)})
        for row in rows
        for name in LAYOUTS
        for side in ("measured", "predicted")
    ]
    return stacked_bars("Latency per token of one sequence", "ms", bars)


@click.command()
@click.option("--cluster", default="local", show_default=True)
@click.option("--markdown", "page", type=click.Path(path_type=Path), help="Write the table there too.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write a picture.")
def main(cluster: str, page: Path | None, svg: Path | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="triaxial-") as folder:
        rows = measure(Path(folder), cluster)
    click.echo(markdown(rows))
    if page is not None:
        write_atomically(page, markdown(rows))
    if svg is not None:
        write_atomically(svg, picture(rows) + "\n")


if __name__ == "__main__":
    main()
