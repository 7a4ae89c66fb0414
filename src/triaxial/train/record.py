"""A run's folder: settings, one line of metrics a step, TensorBoard, and what a person sees meanwhile."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from triaxial import BadInput
from triaxial.files import write_atomically
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.train.checkpoint.save import Save
from triaxial.train.config import SETTINGS, TrainConfig
from triaxial.train.description import keep_description

_LINES_WITHOUT_A_TERMINAL = 20

Metrics = dict[str, float | int | str]


class RunRecord:
    """Writes the run's folder; only rank 0 has one. Use as a context manager."""

    def __init__(self, config: TrainConfig, first_step: int, planned_steps: int) -> None:
        """Open the folder; of a resumed run, leave out what was recorded of `first_step` and later ones before."""
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out / SETTINGS, config.model_dump_json(indent=2) + "\n")
        keep_description(config)
        self._folder = config.out
        self._metrics = _MetricsFile(config.out / "metrics.jsonl", first_step)
        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=first_step)
        self._excepthook = threading.excepthook
        threading.excepthook = self._in_thread
        self._every = max(1, planned_steps // _LINES_WITHOUT_A_TERMINAL)
        self._planned = planned_steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("training", total=planned_steps, completed=first_step, numbers="")

    def __enter__(self) -> RunRecord:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._metrics.close()
        with suppress(OSError):
            self._board.close()
        threading.excepthook = self._excepthook

    def step(self, metrics: Metrics) -> None:
        """Append one step's numbers; they are on disk when this returns."""
        self._metrics.write(metrics)
        for name, value in metrics.items():
            if name != "step":
                self._draw(f"train/{name}", value, int(metrics["step"]))
        numbers = (
            f"loss {metrics['loss']:.4f}  norm {metrics['grad_norm']:.3f}  {metrics['tokens_per_s']:,.0f} tokens/s"
        )
        self._bar.update(self._task, advance=1, numbers=numbers)
        done = int(metrics["step"]) + 1
        if self._bar.disable and (done % self._every == 0 or done == self._planned):
            print(f"step {done}/{self._planned}  {numbers}", file=sys.stderr, flush=True)

    def timeline(self, measured: MeasuredStep) -> None:
        """Keep one step's table with the begin and end of its actions, which `triaxial schedule --run` draws."""
        write_atomically(self._folder / "timeline.json", measured.to_json() + "\n")

    def evaluation(self, step: int, loss: float) -> None:
        """Append a validation loss, measured after `step`."""
        self._metrics.write({"step": step, "eval_loss": loss})
        self._draw("eval/loss", loss, step)
        self._bar.console.print(f"after step {step + 1}: validation loss {loss:.4f}")

    def checkpoint(self, save: Save) -> None:
        """Append how a checkpoint fared; a failed one is told on the terminal too."""
        step, times = save.step - 1, {"checkpoint_s": save.seconds, "checkpoint_stall_s": save.stall_s}
        if save.error is None:
            self._metrics.write({"step": step, "checkpoint_bytes": save.bytes, **times})
            return
        self._metrics.write({"step": step, "checkpoint_error": save.error, **times})
        words = f"after step {save.step}: the checkpoint failed and training goes on: {save.error}"
        self._bar.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, which would print a traceback when the disk is full."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def _draw(self, name: str, value: float | int | str, step: int) -> None:
        with suppress(OSError):  # a full disk, of which the checkpoint and the metrics tell
            self._board.add_scalar(name, value, step)


class _MetricsFile:
    """JSON lines that are on the way to the disk when they are written, or as soon as the disk has room again."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open the file and cut it off before the first record of `first_step` or a later one.

        Raises:
            BadInput: it holds something else, or cannot be written.
        """
        if path.exists():
            write_atomically(path, "".join(_before(first_step, path)))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, record: Metrics) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        with suppress(OSError):
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        try:
            if self._waiting:
                self._file.write(self._waiting)
        finally:
            self._file.close()


def _before(step: int, path: Path) -> Iterator[str]:
    """The file's lines on steps before one; a last line that was not written to its end is left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        try:
            if json.loads(line)["step"] < step:
                yield line
        except (ValueError, LookupError, TypeError):
            raise BadInput(f"{path}: line {number} is no record of a step") from None
