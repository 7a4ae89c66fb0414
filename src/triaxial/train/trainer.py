"""The training loop of one rank."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray

from triaxial.model import IGNORE
from triaxial.model.spec import load_model_spec
from triaxial.model.weights import SafetensorsFolder, initial_values
from triaxial.parallel.data import PRECISIONS
from triaxial.parallel.program import Shape, build_program
from triaxial.parallel.stage import MicroBatch
from triaxial.parallel.timeline import gather_timeline
from triaxial.plan.layout import micro_batches
from triaxial.plan.pipeline.measured import MeasuredStep
from triaxial.train.checkpoint.load import restore
from triaxial.train.checkpoint.save import Policy, Saver
from triaxial.train.checkpoint.state import TrainingState
from triaxial.train.config import TrainConfig
from triaxial.train.corpus import Corpus
from triaxial.train.optimizer import Optimizer, learning_rate
from triaxial.train.order import sample_indices
from triaxial.train.record import Metrics, RunRecord
from triaxial.train.step import StepResult, Tokens, evaluate, make_micro_batches, own_samples, training_step

_TIMELINE_STEP = 2
"""The step whose timeline is kept: the third, when everything is warm."""

Timed = tuple[list[MicroBatch], float]
"""Micro-batches, and the seconds that their samples were read for."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the world."""

    rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009


class Trainer:
    """One rank of a training run. The process group must exist where the layout has more than one rank."""

    def __init__(self, config: TrainConfig, corpus: Corpus, place: Place) -> None:
        """Build the model with its initial values or, of a resumed run, those of its newest whole checkpoint.

        Raises:
            BadInput: data too short for the sequence length, token ids beyond the model's vocabulary, or a run that
                cannot be resumed.
        """
        self.config, self._corpus, self._place = config, corpus, place
        self.spec = load_model_spec(config.model)
        layout = config.parsed_layout
        corpus.require_vocab(self.spec.vocab)
        self._training, self._held_out = corpus.split(config.seq_len, config.held_out)
        self.program = build_program(
            self.spec,
            layout,
            shape=Shape(layout.mb, config.seq_len),
            num_micro_batches=micro_batches(layout, config.global_batch),
            precision=PRECISIONS[config.precision],
            device=place.device,
            rank=place.rank,
            schedule=config.own_schedule,
            timeout=timedelta(seconds=config.timeout),
        )
        self._optimizer = Optimizer(self.program.units, config.hyperparameters)
        self._loss_dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self._state = TrainingState(self.program.units, self._optimizer)
        described = self.spec.model_dump(mode="json", exclude={"name"})
        self._job = config.fixed | {"data": corpus.manifest.digest, "model": described}
        self._first_step = self._restore() if config.resume else self._begin()

    def _begin(self) -> int:
        """Give the parameters their initial values."""
        config = self.config
        self.program.load(SafetensorsFolder(config.init) if config.init else initial_values(self.spec, config.seed))
        return 0

    def _restore(self) -> int:
        """Go back to the newest whole checkpoint, or to the beginning if there is none yet. Returns the steps done."""
        run = self.config.out
        restored = restore(run, self._state, self.program.mesh, self._job)
        if self._place.rank == 0:
            notes = restored.notes if restored else []
            where = f"step {restored.step}" if restored else "the beginning: no checkpoint was saved yet"
            print("\n".join([*notes, f"{run} goes on after {where}"]), file=sys.stderr, flush=True)
        return restored.step if restored else self._begin()

    def run(self) -> None:
        """Train to the end, or to `stop_after`; rank 0 keeps the record."""
        config = self.config
        planned = min(config.steps, config.stop_after or config.steps)
        policy = Policy(config.keep_last, config.keep_every, config.timeout)
        first_step, rank = self._first_step, self._place.rank
        with (
            RunRecord(config, first_step, planned) if rank == 0 else nullcontext() as record,
            Saver(config.out, self._state, self.program.mesh, self._job, policy) as saver,
        ):
            for step in range(first_step, planned):
                began = time.perf_counter()
                lr = learning_rate(step, config.steps, config.hyperparameters)
                batch, data_s = self._batch(step)
                result = training_step(self.program, self._optimizer, batch, lr, saver.before_update, data_s)
                if record:
                    record.step(self._metrics(step, lr, result, time.perf_counter() - began))
                if step == min(_TIMELINE_STEP, planned - 1):
                    self._keep_timeline(step, result, record)
                if self._evaluates_after(step, planned):
                    loss = evaluate(self.program, self._validation_batch()[0])
                    if record:
                        record.evaluation(step, loss)
                if step + 1 == planned or (step + 1) % (config.checkpoint_every or planned) == 0:
                    saver.start(step + 1)
                self._report_saves(saver, record)
            saver.finish()
            self._report_saves(saver, record)

    def _report_saves(self, saver: Saver, record: RunRecord | None) -> None:
        for save in saver.completed():
            if record:
                record.checkpoint(save)

    def _keep_timeline(self, step: int, result: StepResult, record: RunRecord | None) -> None:
        program = self.program
        timeline = gather_timeline(program.schedule, program.mesh.pp, result.spans, self._place.device)
        if record:
            record.timeline(MeasuredStep(step, program.schedule, timeline))

    def _evaluates_after(self, step: int, planned: int) -> bool:
        every = self.config.eval_every
        return bool(self._held_out) and (step + 1 == planned or (every is not None and (step + 1) % every == 0))

    def _batch(self, step: int) -> Timed:
        indices = sample_indices(step, self.config.global_batch, len(self._training), self.config.seed)
        return self._micro_batches(own_samples(indices, self.program.mesh))

    def _validation_batch(self) -> Timed:
        """The first held-out samples, one global batch; where there are fewer, the rest counts for nothing."""
        wanted = own_samples(np.arange(self.config.global_batch), self.program.mesh)
        return self._micro_batches(
            self._held_out.start + wanted % len(self._held_out), counted=wanted < len(self._held_out)
        )

    def _micro_batches(self, indices: Tokens, counted: NDArray[np.bool_] | bool = True) -> Timed:
        began = time.perf_counter()
        ids, labels = self._corpus.batch(indices, self.config.seq_len)
        data_s = time.perf_counter() - began
        labels[~np.broadcast_to(counted, len(labels))] = IGNORE
        return make_micro_batches(ids, labels, self.program.mesh, self._loss_dtype), data_s

    def _metrics(self, step: int, lr: float, result: StepResult, seconds: float) -> Metrics:
        tokens = self.config.global_batch * self.config.seq_len
        flop = self.spec.train_flop_per_token(self.config.seq_len) * tokens
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "bubble_fraction": result.bubble_fraction,
            "data_s": result.data_s,
            "model_tflops": flop / seconds / self.program.layout.world_size / 1e12,
        }
