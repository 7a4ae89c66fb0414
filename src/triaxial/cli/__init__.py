"""The command line: one module a command, loaded only when it is called; no logic lives here."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from triaxial import BadInput, NoAnswer, __version__

COMMANDS: dict[str, tuple[str, str]] = {
    # command: (module, one line of help); the planner's commands must not pay for importing torch
    "demo": ("demo", "Train a small model under three layouts on this machine."),
    "train": ("train", "Train a model under any layout."),
    "plan": ("plan", "Find the best layout for a model, a cluster and a workload, and say why."),
    "estimate": ("estimate", "Price one layout."),
    "validate": ("validate", "Hold predictions against published measurements."),
    "generate": ("generate", "Continue prompts with a model under any layout."),
    "serve": ("serve", "Serve a model over HTTP as OpenAI does."),
    "export-hf": ("export_hf", "Write a run's weights as a Hugging Face model folder."),
    "probe": ("probe", "Measure the devices and links of this cluster."),
    "bench": ("bench", "Run layouts for real and hold predictions against them."),
    "lab": ("lab", "Run a command on slow-linked nodes made on this machine."),
    "rehearse": ("rehearse", "Rehearse a plan's step on this machine, with waits in place of compute."),
    "schedule": ("schedule", "Show a pipeline schedule, its bubble and its memory."),
}


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"triaxial.cli.{COMMANDS[cmd_name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Plan, run and measure transformers spread over many GPUs."""


def main() -> None:
    """Entry point. Exit codes: 0 done; 1 the answer is no; 2 bad input (one sentence on standard error)."""
    try:
        cli(standalone_mode=False)
    except (BadInput, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"triaxial: {message}", file=sys.stderr)
        sys.exit(2)
    except NoAnswer as error:
        print(f"triaxial: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        print("triaxial: interrupted", file=sys.stderr)
        sys.exit(130)
