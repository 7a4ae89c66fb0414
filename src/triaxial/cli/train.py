"""`triaxial train`: train a model under a layout."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from triaxial import BadInput
from triaxial.cluster.spec import LOCAL, PROBED
from triaxial.plan.layout import Recompute, parse_layout


@click.command(name="train")
@click.argument("model", required=False)
@click.option("--data", type=click.Path(path_type=Path), help="Text, .jsonl, .parquet, or a folder of such or of code.")
@click.option("--init", type=click.Path(path_type=Path), help="A Hugging Face model folder to start from.")
@click.option("--layout", help="How to spread the model, like tp=2,pp=2,dp=1,mb=1.  [default: tp=1]")
@click.option("--plan", type=click.Path(path_type=Path), help="What `triaxial plan --out` wrote: layout and workload.")
@click.option("--auto", is_flag=True, help="Plan for --cluster, and take the best layout.")
@click.option("--cluster", help="What --auto plans for and the run is held against, as for plan.  [default: local]")
@click.option(
    "--schedule-table", type=click.Path(path_type=Path), help="A pipeline schedule of your own: a JSON table."
)
@click.option("--zero", type=click.IntRange(0, 3), help="ZeRO stage, over the layout's.")
@click.option("--recompute", type=click.Choice(get_args(Recompute)), help="Activation recompute, over the layout's.")
@click.option("--steps", type=int, help="Optimizer steps.  [default: 100]")
@click.option("--global-batch", type=int, help="Sequences per step over all ranks.  [default: 8]")
@click.option("--seq-len", type=int, help="Tokens per sequence.  [default: 512]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 3e-4]")
@click.option("--warmup-steps", type=int, help="Steps of linear warm-up.  [default: 10]")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp64"]), help="[default: fp32]")
@click.option("--seed", type=int, help="Of initial values and sample order.  [default: 0]")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json.  [default: --init's, or bytes]")
@click.option("--eval-every", type=int, help="Steps between evaluations.  [default: at the end]")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/MODEL-TIME]")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints.  [default: at the end]")
@click.option("--keep-last", type=int, help="Checkpoints that stay.  [default: 2]")
@click.option("--keep-every", type=int, help="Checkpoints of every so many steps stay for ever.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option("--elastic", is_flag=True, default=None, help="Go on with --out, under torchrun on the ranks there are.")
@click.option("--stop-after", type=int, help="Leave off after this many steps.")
@click.option("--timeout", type=float, help="Seconds a rank waits for another.  [default: 600]")
@click.option("--port", type=int, help="Of the local rendezvous.  [default: a free one]")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file with any of these; flags win over it.")
def command(
    config: Path | None, resume: Path | None, plan: Path | None, auto: bool, cluster: str | None, **flags: Any
) -> None:
    """Train MODEL, a preset, a config.json or a model folder, on text.

    Starts the layout's ranks on this machine, or joins the torchrun that it is run under.
    """
    from triaxial.train.worker import end_with_torchrun

    end_with_torchrun()
    from triaxial.report.run_comparison import write_comparison
    from triaxial.report.run_timeline import draw_run
    from triaxial.train.config import continue_run, make_config, read_toml
    from triaxial.train.launch import launch
    from triaxial.train.planned import plan_layout, read_plan

    settings = read_toml(config) if config else {}
    settings |= {name: value for name, value in flags.items() if value is not None}
    if resume:
        settings = continue_run(resume, settings)
    if settings.get("init"):
        settings.setdefault("model", str(settings["init"]))
    if sum(map(bool, (settings.get("layout"), plan, auto))) > 1:
        raise BadInput("layout: give one of --layout, --plan and --auto")
    if plan:
        settings = read_plan(plan, settings.get("model")) | settings
    for name in ("model", "data"):
        if name not in settings:
            raise BadInput(
                f"{name} is missing: give {'MODEL or --init' if name == 'model' else '--data'}, or name it in --config"
            )
    if settings.get("elastic") and "out" not in settings:
        raise BadInput("elastic goes on with the run in --out, the same at every start: give it")
    if auto:
        settings["layout"] = plan_layout(cluster or LOCAL, settings)
        click.echo(f"layout: {settings['layout']}")
    layout = parse_layout(str(settings.get("layout", "tp=1")))
    over: dict[str, Any] = {name: settings.pop(name) for name in ("zero", "recompute") if name in settings}
    settings["layout"] = str(replace(layout, **over))
    settings.setdefault("out", Path("runs") / f"{Path(str(settings['model'])).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    checked = make_config(settings)
    if launch(checked):
        draw_run(checked.out)
        click.echo(f"run: {checked.out}")
        if cluster or PROBED.is_file():
            click.echo(write_comparison(checked.out, cluster or LOCAL), err=True)
