"""A run's folder: settings, one line of metrics a step, TensorBoard, and what a person sees meanwhile."""

from __future__ import annotations

import json
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from triaxial.files import write_atomically
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.train.config import TrainConfig

_LINES_WITHOUT_A_TERMINAL = 20

Metrics = dict[str, float | int]


class RunRecord:
    """Writes the run's folder; only rank 0 has one. Use as a context manager."""

    def __init__(self, config: TrainConfig, planned_steps: int) -> None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out / "settings.json", config.model_dump_json(indent=2) + "\n")
        self._folder = config.out
        self._metrics = (config.out / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(config.out / "tensorboard"))
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
        self._task = self._bar.add_task("training", total=planned_steps, numbers="")

    def __enter__(self) -> RunRecord:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._metrics.close()
        self._board.close()

    def step(self, metrics: Metrics) -> None:
        """Append one step's numbers; they are on disk when this returns."""
        self._write(metrics)
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, int(metrics["step"]))
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
        self._write({"step": step, "eval_loss": loss})
        self._board.add_scalar("eval/loss", loss, step)
        self._bar.console.print(f"after step {step + 1}: validation loss {loss:.4f}")

    def _write(self, record: Metrics) -> None:
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
