"""Prompts in, answers out, over all replicas of a layout: what `triaxial generate` does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from triaxial import BadInput, NoAnswer
from triaxial.plan.layout import parse_layout
from triaxial.serve.engine import Engine
from triaxial.serve.request import EngineFailed, Request, Sampling
from triaxial.serve.settings import EngineSettings
from triaxial.serve.text import TextStream, TextTokenizer, load_text_tokenizer

T = TypeVar("T")
Show = Callable[[str], None]
Done = Callable[[int, "Answer"], None]


@dataclass
class Answer:
    """What one prompt was continued with. Times are in seconds from when the prompt was handed over."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    ttft_s: float = 0.0
    tpot_s: float | None = None
    """Between tokens, on average; None with a single token."""
    tokens_per_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        given = asdict(self)
        timings = {name: given.pop(name) for name in ("ttft_s", "tpot_s", "tokens_per_s")}
        return given | {"timings": timings}


class Generator:
    """The replicas of a layout, all started, and a tokenizer if the model has one. Use it as a context."""

    def __init__(self, settings: EngineSettings) -> None:
        """`settings.layout` may have dp here. Raises BadInput for what cannot be run."""
        layout = parse_layout(settings.layout)
        each = settings.model_copy(update={"layout": str(replace(layout, dp=1)), "memory_share": 1 / layout.dp})
        self._engines = [Engine(each) for _ in range(layout.dp)]
        self._outstanding = [0] * layout.dp
        self.tokenizer: TextTokenizer | None = load_text_tokenizer(Path(settings.model))
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Generator:
        for engine in self._engines:
            self._stack.push_async_callback(engine.stop)
        try:
            await asyncio.gather(*(engine.start() for engine in self._engines))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def pids(self) -> list[int]:
        """Of all ranks of all replicas."""
        return [pid for engine in self._engines for pid in engine.pids]

    def tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt.

        Raises:
            BadInput: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise BadInput("the model has no tokenizer.json: give token ids with --prompt-ids")
        return tuple(self.tokenizer.encode(text))

    def check(self, prompt: tuple[int, ...], sampling: Sampling) -> None:
        """Raises BadInput for a prompt that the model does not take."""
        self._engines[0].check(Request("", prompt, sampling))

    async def answer(self, prompt: tuple[int, ...], sampling: Sampling, stop: Sequence[str], show: Show) -> Answer:
        """Continue one prompt on the replica that has least to do; `show` gets the text as it comes.

        Without a tokenizer the text is the token ids.
        """
        stream, answer, begin, first = TextStream(self.tokenizer, stop), Answer(len(prompt)), time.perf_counter(), 0.0
        work = len(prompt) + sampling.max_tokens
        replica = self._outstanding.index(min(self._outstanding))
        self._outstanding[replica] += work
        try:
            chunks = self._engines[replica].generate(Request("", prompt, sampling))
            async for chunk in chunks:
                first = first or time.perf_counter()
                answer.token_ids += chunk.tokens
                answer.logprobs += (one.logprob for one in chunk.logprobs)
                text = stream.add(chunk.tokens, last=chunk.finish_reason is not None)
                if self.tokenizer is None:
                    text = "".join(f"{token} " for token in chunk.tokens)
                answer.text += text
                show(text)
                answer.finish_reason = "stop" if stream.stopped else chunk.finish_reason or ""
                if stream.stopped:
                    await chunks.aclose()  # type: ignore[attr-defined]
                    break
        finally:
            self._outstanding[replica] -= work
        end, count = time.perf_counter(), len(answer.token_ids)
        answer.ttft_s, answer.tokens_per_s = first - begin, count / (end - begin)
        answer.tpot_s = (end - first) / (count - 1) if count > 1 else None
        return answer


@dataclass(frozen=True)
class Prompt:
    """Text or token ids."""

    text: str | None = None
    ids: tuple[int, ...] = ()

    def tokens(self, generator: Generator) -> tuple[int, ...]:
        return self.ids if self.text is None else generator.tokens(self.text)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file: `{"prompt": "text"}` or `{"prompt_ids": [5, 17, 9]}` a line.

    Raises:
        BadInput: names the line that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    prompts = [_prompt(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise BadInput(f"{path} holds no prompt")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        given = json.loads(line)
        if isinstance(given.get("prompt"), str):
            return Prompt(given["prompt"])
        if all(isinstance(token, int) for token in given["prompt_ids"]):
            return Prompt(ids=tuple(given["prompt_ids"]))
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise BadInput(f'{where} is not {{"prompt": "text"}} or {{"prompt_ids": [5, 17, 9]}}')


def generate(
    settings: EngineSettings,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    stop: Sequence[str] = (),
    show: Show = lambda text: None,
    done: Done = lambda index, answer: None,
) -> list[Answer]:
    """Continue all prompts, together as far as they fit; `show` gets the pieces of text, `done` each answer.

    Raises:
        BadInput: a model, layout or prompt that cannot be used.
        NoAnswer: a rank failed; names the rank and the cause.
    """

    async def one(generator: Generator, index: int, tokens: tuple[int, ...]) -> Answer:
        answer = await generator.answer(tokens, sampling, stop, show)
        done(index, answer)
        return answer

    async def run() -> list[Answer]:
        generator = Generator(settings)
        tokens = [prompt.tokens(generator) for prompt in prompts]
        for ids in tokens:  # before anything is started
            generator.check(ids, sampling)
        async with generator, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(generator, i, ids)) for i, ids in enumerate(tokens)]
        return [task.result() for task in tasks]

    return run_to_end(run())


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run what uses a `Generator`.

    Raises:
        BadInput: of what it was asked.
        NoAnswer: a rank failed; names the rank and the cause.
    """
    try:
        return asyncio.run(work)
    except ExceptionGroup as failures:
        raise _first(failures) from None
    except EngineFailed as error:
        raise NoAnswer(str(error)) from None


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    """The failure that ended the group: the others were cancelled."""
    error = failures.exceptions[0]
    return NoAnswer(str(error)) if isinstance(error, EngineFailed) else error
