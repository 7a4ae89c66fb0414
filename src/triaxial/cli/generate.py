"""`triaxial generate`: continue prompts with a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress

from triaxial import BadInput
from triaxial.serve.request import Sampling

if TYPE_CHECKING:
    from triaxial.serve.generation import Answer


@click.command(name="generate")
@click.argument("model")
@click.option("--prompt", help="Text to continue; without any prompt, standard input.")
@click.option("--prompt-ids", help="Token ids to continue, like 5,17,9.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help='A JSONL file of {"prompt": ...} or {"prompt_ids": ...}.'
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--seed", type=int, help="The same seed gives the same text.  [default: a new one]")
@click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--layout", default="tp=1", show_default=True, help="Like tp=2,pp=2,dp=2.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with tokens, logprobs and timings.")
def command(
    model: str,
    prompt: str | None,
    prompt_ids: str | None,
    prompts: Path | None,
    stop: tuple[str, ...],
    precision: str,
    layout: str,
    as_json: bool,
    **sampled: Any,
) -> None:
    """Continue prompts with MODEL: a Hugging Face folder, or a preset or config.json with random weights.

    One prompt's text is printed as it comes; a file's answers as JSON lines in its order.
    """
    from triaxial.serve.generation import Prompt, generate, read_prompts
    from triaxial.serve.settings import make_settings

    if sum(given is not None for given in (prompt, prompt_ids, prompts)) > 1:
        raise BadInput("give one of --prompt, --prompt-ids and --prompts")
    if prompts is not None:
        asked = read_prompts(prompts)
    elif prompt_ids is not None:
        asked = [Prompt(ids=_ids(prompt_ids))]
    else:
        asked = [Prompt(sys.stdin.read().removesuffix("\n") if prompt is None else prompt)]
    settings = make_settings(model=model, layout=layout, precision=precision)
    sampling = Sampling(**sampled, logprobs=0)
    if prompts is None:
        answers = generate(settings, asked, sampling, stop, show=(lambda _: None) if as_json else _show)
        click.echo(json.dumps(answers[0].as_dict(), indent=2) if as_json else "")
        return
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("generating", total=len(asked))
        answers = generate(settings, asked, sampling, stop, done=lambda index, answer: bar.advance(task))
    _print_all(answers, as_json)


def _show(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _print_all(answers: list[Answer], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([answer.as_dict() for answer in answers], indent=2))
    else:
        for answer in answers:
            click.echo(json.dumps(answer.as_dict()))


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--prompt-ids {text!r} is not whole numbers with commas between, like 5,17,9") from None
