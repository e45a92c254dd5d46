"""The training loop of every task: updates, log lines, evaluations, checkpoints, rollbacks."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipeline.batches import Batch
from data_pipeline.errors import RunError, UsageError
from data_pipeline.loader import ImageLoader
from mae_scale.checkpoints.resume import load_newest
from mae_scale.distributed import stop_requests
from mae_scale.engines.base import Engine, StepResult
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.self_check import SelfCheck
from mae_scale.training.skipped_steps import RollBack, SkippedSteps
from mae_scale.training.step_metrics import StepClock, step_metrics
from mae_scale.training.system_metrics import SystemMetrics
from mae_scale.training.task import Evaluator

log = logging.getLogger("mae_scale")

OpenLoader = Callable[[int], ImageLoader]
"""Opens this rank's batches, beginning at a step."""


@dataclass
class Loop:
    """Trains an engine's objective. All ranks make one and call it alike."""

    context: RunContext
    engine: Engine
    tensors_of: Callable[[Batch, torch.device], tuple[torch.Tensor, ...]]
    """Maps a micro-batch to the objective's inputs."""
    tracker: Tracker
    evaluators: list[Evaluator]
    self_check: SelfCheck
    system: SystemMetrics
    _losses: list[float] = field(default_factory=list)
    """Losses logged since the last checkpoint."""
    _measured: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluators after the last update, empty where none was due."""

    def train(self, start: int, open_loader: OpenLoader) -> str | None:
        """Run the updates after `start` to the last of this start, and write a final checkpoint.

        Returns None when all are done, or the signal that asked to stop. Raises RunError when the run cannot go on,
        UsageError when that is for its input.
        """
        saver, micro_batch = self.context.saver, self.context.layout.micro_batch
        while True:
            try:
                with open_loader(start) as loader:
                    return self._updates(loader, start)
            except RollBack as reason:
                start = self._roll_back(reason)
            except (RunError, UsageError, torch.OutOfMemoryError) as error:
                with contextlib.suppress(RunError, RuntimeError):  # what is being written is not lost
                    saver.wait()
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                cut = "a smaller one (the same batches, more accumulation)" if self.context.recipe.moco is None else ""
                raise RunError(
                    f"the GPU has too little memory for engine.micro_batch={micro_batch}; choose "
                    f"{cut or 'more ranks'} or engine.activation_checkpointing=all: "
                    f"{_first_sentences(error)}"
                ) from error

    def _updates(self, loader: ImageLoader, start: int) -> str | None:
        context, last = self.context, self.context.steps.last
        if context.control.any(stop_requests.requested() is not None):  # while it started: nothing new to save
            return self._stopped(start)
        clock, skips, batches = StepClock(context.layout.global_batch), SkippedSteps(context), iter(loader)
        owed, self._losses = False, []
        for done in range(start + 1, last + 1):
            lr, decay = context.learning_rate(done - 1), context.momentum(done - 1)
            result = self.engine.train_step(self._inputs(batches, clock), lr, decay)
            stop, retry = self._agree()
            skips.settle()  # of the step before; the device is at work on this one
            skips.check()
            skips.add(done, result.skipped)
            owed = owed or retry or self._checkpoint_is_due(done)
            due = [evaluator for evaluator in self.evaluators if evaluator.due(done)]
            logged = stop or due or self._log_is_due(done) or done in (start + 1, last)
            self._measured = {}
            if logged or owed:
                context.control.meet()
                skips.settle()
            if logged:
                self._log(result, loader, clock, done, due)
            skips.check()
            # Not between skipped steps: what has led to them may be in the weights already.
            if stop or done == last or (owed and not skips.in_a_row):
                self._save(done, is_end=stop or done == last)
                clock.restart(done)
                owed, self._losses = False, []
            if stop and done < last:
                return self._stopped(done)
        return None

    def _inputs(self, batches: Iterator[Batch], clock: StepClock) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the tensors of one step's micro-batches, the time spent waiting for them measured."""
        for _ in range(self.context.layout.accumulation):
            waiting = time.perf_counter()
            batch = next(batches)
            clock.data_wait_s += time.perf_counter() - waiting
            clock.count(batch)
            yield self.tensors_of(batch, self.context.device)

    def _agree(self) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether any asks for a checkpoint that failed again.

        Called before anything that waits for the device: this wait has a timeout, and names a rank that is lost.
        """
        control, saver = self.context.control, self.context.saver
        stop, save_failed, retry = control.agree(
            stop_requests.requested() is not None, saver.has_failed(), saver.retry_is_due()
        )
        if save_failed:
            saver.wait()
            control.forget()
        return stop, retry

    def _log_is_due(self, done: int) -> bool:
        return _due(done, self.context.recipe.tracking.log_every_steps)

    def _checkpoint_is_due(self, done: int) -> bool:
        checkpoint, epochs = self.context.recipe.checkpoint, self.context.recipe.checkpoint.every_epochs
        return _due(done, checkpoint.every_steps) or _due(done, epochs and epochs * self.context.steps.per_epoch)

    def _log(self, result: StepResult, loader: ImageLoader, clock: StepClock, done: int, due: list[Evaluator]) -> None:
        """Log step `done`, with what the evaluators that are due measure."""
        metrics = step_metrics(self.context, result, loader, clock, self.system, done=done)
        for evaluator in due:
            self._measured |= evaluator(done)
            clock.restart(done)
        metrics |= self._measured
        self.tracker.log(done, done / self.context.steps.per_epoch, metrics)
        self.self_check.see({"step": done, **metrics})
        self._losses.append(metrics["train/loss"])

    def _save(self, done: int, *, is_end: bool) -> None:
        """Write a checkpoint; the last one of a start until it is written."""
        saver = self.context.saver
        self.tracker.sync()
        saver.save(self.engine.state(), self._facts(done))
        self.context.control.forget()
        while is_end and not saver.wait():
            saver.save(self.engine.state(), self._facts(done))

    def _facts(self, done: int) -> dict[str, Any]:
        """Return what a checkpoint's manifest says.

        loss is the mean over the logged steps since the checkpoint before, measured what evaluators gave at this step.
        """
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        return {
            "step": done,
            "epoch": done / self.context.steps.per_epoch,
            "loss": sum(finite) / len(finite) if finite else None,
            "measured": {name: value for name, value in self._measured.items() if math.isfinite(value)},
            "time": round(time.time(), 3),
            "mlflow_run_id": self.tracker.mlflow_run_id,
            **self.context.facts,
        }

    def _stopped(self, done: int) -> str:
        """Note in the events what has stopped the run after step `done`, and return it."""
        signal = stop_requests.requested() or "a signal to another rank"
        self.context.events.add("stop", done, reason=signal)
        return signal

    def _roll_back(self, reason: RollBack) -> int:
        """Go back to the newest whole checkpoint, to skip the data used since; return its step."""
        context, events = self.context, self.context.events
        limit = context.recipe.checkpoint.max_rollbacks
        advice = "a smaller optim.base_lr, optim.clip_grad_norm, or bf16 instead of fp16 helps"
        if events.count("rollback") >= limit:
            raise RunError(
                f"{reason}, and the run has gone back {limit} times already (checkpoint.max_rollbacks); {advice}",
                on_all_ranks=True,
            )
        context.saver.wait()
        context.control.forget()
        step = resume(context, self.engine)
        if step == 0:
            raise RunError(f"{reason}, and there is no checkpoint yet to go back to; {advice}", on_all_ranks=True)
        skipped = reason.done - step
        events.add("rollback", step, reason=str(reason), skipped_batches=skipped)
        log.warning("%s: back to step %d, and the %d batches since are skipped", reason, step, skipped)
        self.tracker.rewind(step)
        self.self_check.rewind(step)
        self.tracker.artifact(events.path)
        return step


def resume(context: RunContext, engine: Engine) -> int:
    """Load the run's newest whole checkpoint, if there is one; return the updates done. All ranks call it.

    Raises UsageError when it belongs to other images or to other frozen weights.
    """
    manifest = load_newest(engine, context.checkpoints, index=context.index.digest())
    if manifest is None:
        return 0
    if manifest.get("frozen") != context.facts.get("frozen"):
        raise UsageError(
            "the weights that this run does not train are not those that its checkpoints were written with; "
            f"remove frozen.safetensors in {context.out} (it is written again from --weights), or choose another --out",
            on_all_ranks=True,
        )
    return manifest["step"]


def _first_sentences(error: torch.OutOfMemoryError) -> str:
    """Return what torch tried to allocate and what was free, without its advice."""
    return ". ".join(str(error).split(". ")[:3])


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
