"""The one loop of every job: where we stand, data, model, engine, steps, end."""

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from data_pipeline.index import Index
from data_pipeline.loader import Batch, ImageLoader
from mae_scale.checkpoints.resume import load_newest
from mae_scale.checkpoints.save import Saver
from mae_scale.config.schema import Recipe
from mae_scale.distributed import stop_requests
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks
from mae_scale.engines.deepspeed_config import BatchLayout
from mae_scale.errors import RunError, UsageError
from mae_scale.planning.flops import mfu
from mae_scale.tracking.tracker import Tracking
from mae_scale.training.event_log import Events
from mae_scale.training.schedule import Steps, learning_rate, steps_of

log = logging.getLogger("mae_scale")


@dataclass(frozen=True)
class Run:
    """What a training run is given; everything else is a function of the step."""

    recipe: Recipe
    out: Path
    ranks: Ranks
    device: torch.device
    layout: BatchLayout
    index: Index
    facts: dict
    """What a checkpoint's manifest says about the run beside the step."""
    training_flops: int
    """Of one image, forward and backward."""
    peak_flops: float | None
    """What the device could do a second in the run's precision, where that is known."""
    control: Control
    saver: Saver
    events: Events

    @property
    def steps(self) -> Steps:
        return steps_of(self.recipe, len(self.index))

    @property
    def steps_per_epoch(self) -> int:
        return self.steps.per_epoch

    @property
    def total_steps(self) -> int:
        """Updates of the whole schedule."""
        return self.steps.total

    @property
    def last_step(self) -> int:
        """The update after which this start ends."""
        return self.steps.last

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, from 0."""
        schedule = self.recipe.schedule
        return learning_rate(
            step,
            peak_lr=self.recipe.lr,
            steps_per_epoch=self.steps_per_epoch,
            epochs=schedule.epochs,
            warmup_epochs=schedule.warmup_epochs,
        )


class Evaluator(Protocol):
    """What is measured or drawn beside the loss; the loop knows nothing more of it. All ranks call it."""

    def due(self, done: int) -> bool:
        """Whether it is called after update `done`."""

    def __call__(self, done: int) -> dict[str, float]:
        """Metrics by name, after update `done`."""


class RollBack(Exception):
    """Too many steps in a row, up to step `done`, had gradients that are not finite."""

    def __init__(self, count: int, done: int):
        super().__init__(f"{count} steps in a row, up to step {done}, had gradients that are not finite")
        self.done = done


def resume(run: Run, engine) -> int:
    """Load the run's newest whole checkpoint, if there is one; the number of updates done. All ranks call it."""
    manifest = load_newest(engine, run.checkpoints, index=run.index.digest())
    if manifest is None:
        return 0
    if manifest.get("frozen") != run.facts.get("frozen"):
        raise UsageError(
            "the weights that this run does not train are not those that its checkpoints were written with; "
            f"remove frozen.safetensors in {run.out} (it is written again from --weights), or choose another --out",
            on_all_ranks=True,
        )
    return manifest["step"]


def train(
    run: Run,
    engine,
    tensors_of: Callable,
    open_loader: Callable[[int], ImageLoader],
    start: int,
    tracking: Tracking,
    evaluate: Evaluator | None = None,
) -> str | None:
    """Updates start+1 ... run.last_step, with log lines and checkpoints on the way. All ranks call it.

    tensors_of(batch, device) gives what the engine's objective takes, open_loader(step) the batches from a step on.
    Returns None when all are done, or the signal that asked to stop; either way a checkpoint of the end is written.
    Raises RunError when the run cannot go on.
    """
    while True:
        try:
            with open_loader(start) as loader:
                return _updates(run, engine, tensors_of, loader, start, tracking, evaluate)
        except RollBack as reason:
            start = _roll_back(run, engine, tracking, reason)
        except (RunError, torch.OutOfMemoryError) as error:
            with contextlib.suppress(RunError, RuntimeError):  # what is being written is not lost
                run.saver.wait()
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"the GPU has too little memory for engine.micro_batch={run.layout.micro_batch}; choose a smaller one "
                "(the same batches, more accumulation) or engine.activation_checkpointing=all: "
                f"{_first_sentences(error)}"
            ) from error


def _first_sentences(error: torch.OutOfMemoryError) -> str:
    """What torch tried to allocate and what was free, without its advice."""
    return ". ".join(str(error).split(". ")[:3])


def _updates(
    run: Run,
    engine,
    tensors_of: Callable,
    loader: ImageLoader,
    start: int,
    tracking: Tracking,
    evaluate: Evaluator | None,
) -> str | None:
    if run.control.any(stop_requests.requested() is not None):  # while it started: there is nothing new to save
        return _stopped(run, start)
    clock, batches, skips = _Clock(run), iter(loader), _Skips(run)
    owed, losses = False, []
    for step in range(start, run.last_step):
        lr = run.learning_rate(step)
        result = engine.train_step(_inputs(batches, run, tensors_of, clock), lr)
        done = step + 1
        # Before anything that waits for the device: this wait has a timeout, and names a rank that is lost.
        stop, save_failed, retry = run.control.agree(
            stop_requests.requested() is not None, run.saver.has_failed(), run.saver.retry_is_due()
        )
        if save_failed:
            run.saver.wait()
            run.control.forget()
        skips.settle()  # of the step before; the device is at work on this one
        skips.check()
        skips.add(done, result.skipped)
        owed = owed or retry or _checkpoint_due(run, done)
        measure = evaluate is not None and evaluate.due(done)
        logged = _due(done, run.recipe.tracking.log_every_steps) or done in (start + 1, run.last_step)
        if stop or measure or logged or owed:
            run.control.meet()
            skips.settle()
        if stop or measure or logged:
            metrics = _metrics(run, result, loader, lr, clock, done)
            if measure:
                metrics |= evaluate(done)
                clock.restart(done)
            tracking.log(done, done / run.steps_per_epoch, metrics)
            losses.append(metrics["train/loss"])
        skips.check()
        # Not between skipped steps: what has led to them may be in the weights already.
        if stop or done == run.last_step or (owed and not skips.in_a_row):
            tracking.sync()
            run.saver.save(engine.state(), _facts(run, tracking, done, losses))
            run.control.forget()
            clock.restart(done)
            owed, losses = False, []
        if stop or done == run.last_step:
            while not run.saver.wait():
                run.saver.save(engine.state(), _facts(run, tracking, done, losses))
        if stop and done < run.last_step:
            return _stopped(run, done)
    return None


def _stopped(run: Run, done: int) -> str:
    """Note in the events what has stopped the run after step `done`, and return it."""
    signal = stop_requests.requested() or "a signal to another rank"
    run.events.add("stop", done, reason=signal)
    return signal


def _roll_back(run: Run, engine, tracking: Tracking, reason: RollBack) -> int:
    """Go back to the newest whole checkpoint, and from there on skip the data that was used since; its step."""
    limit, events = run.recipe.checkpoint.max_rollbacks, run.events
    advice = "a smaller optim.base_lr, optim.clip_grad_norm, or bf16 instead of fp16 helps"
    if events.count("rollback") >= limit:
        raise RunError(
            f"{reason}, and the run has gone back {limit} times already (checkpoint.max_rollbacks); {advice}",
            on_all_ranks=True,
        )
    run.saver.wait()
    run.control.forget()
    step = resume(run, engine)
    if step == 0:
        raise RunError(f"{reason}, and there is no checkpoint yet to go back to; {advice}", on_all_ranks=True)
    skipped = reason.done - step
    events.add("rollback", step, reason=str(reason), skipped_batches=skipped)
    log.warning("%s: back to step %d, and the %d batches since are skipped", reason, step, skipped)
    tracking.rewind(step)
    tracking.artifact(events.path)
    return step


def _facts(run: Run, tracking: Tracking, done: int, losses: list[float]) -> dict:
    """What the manifest of a checkpoint says; loss is the mean over the logged steps since the one before."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return {
        "step": done,
        "epoch": done / run.steps_per_epoch,
        "loss": sum(finite) / len(finite) if finite else None,
        "time": round(time.time(), 3),
        "mlflow_run_id": tracking.mlflow_run_id,
        **run.facts,
    }


class _Skips:
    """The steps whose gradients were not finite.

    Whether a step was one is read when the next has been launched, so that the device is never without work. Nothing
    depends on it in between: such a step has changed nothing.
    """

    def __init__(self, run: Run):
        self._run = run
        self._unread: tuple[int, Callable[[], bool]] | None = None
        self._last = 0
        self.in_a_row = 0

    def add(self, done: int, skipped: Callable[[], bool]) -> None:
        """Note step `done`, to be settled later."""
        self._unread = done, skipped

    def settle(self) -> None:
        """Read what was noted; waits for that step."""
        if self._unread is None:
            return
        (self._last, skipped), self._unread = self._unread, None
        if not skipped():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._run.events.add("skipped_step", self._last)
        log.warning("step %d: the gradients are not finite; nothing was updated", self._last)

    def check(self) -> None:
        """Raise RollBack when there were too many in a row up to the last step that was read.

        What a step launched since has done is undone too; its batch comes again and is not skipped.
        """
        if self.in_a_row >= self._run.recipe.checkpoint.rollback_after_skips:
            raise RollBack(self.in_a_row, self._last)


def _inputs(batches: Iterator, run: Run, tensors_of: Callable, clock: "_Clock"):
    """The tensors of one step's micro-batches, the time spent waiting for them measured."""
    for _ in range(run.layout.accumulation):
        waiting = time.perf_counter()
        batch = next(batches)
        clock.data_wait_s += time.perf_counter() - waiting
        clock.count(batch)
        yield tensors_of(batch, run.device)


class _Clock:
    """Seconds and steps since the last log line, save or evaluation; images since the last log line."""

    def __init__(self, run: Run):
        self._run = run
        self._counts = [0, 0, 0]
        self.restart(None)

    def restart(self, done: int | None) -> None:
        """Begin to measure at a step; None: at the first one, which is not timed by itself."""
        self.began, self.from_step, self.data_wait_s = time.perf_counter(), done, 0.0

    def count(self, batch: Batch) -> None:
        """Note a micro-batch."""
        found = batch.replaced, batch.cache_hits, len(batch.positions)
        self._counts = [a + b for a, b in zip(self._counts, found, strict=True)]

    def take_counts(self) -> list[int]:
        """Return how many images were replaced, came from the cache, and were there at all, since the last call."""
        counts, self._counts = self._counts, [0, 0, 0]
        return counts

    def rates(self, done: int) -> dict[str, float]:
        """perf/... since the last call; call after the device is known to have finished step `done`."""
        if self.from_step is None:
            self.from_step = done - 1
        steps = max(1, done - self.from_step)
        step_time = (time.perf_counter() - self.began) / steps
        rates = {
            "perf/images_per_second": self._run.recipe.data.global_batch / step_time,
            "perf/step_time_s": step_time,
            "perf/data_wait_s": self.data_wait_s / steps,
        }
        self.restart(done)
        return rates


def _metrics(run: Run, result, loader: ImageLoader, lr: float, clock: _Clock, done: int) -> dict[str, float]:
    """One log line. Here the host waits for the device; elsewhere only for the step before (_Skips)."""
    counts = torch.tensor([len(loader.bad_images), *clock.take_counts()], device=run.device, dtype=torch.float32)
    shared = torch.cat([result.loss.reshape(1), counts])
    torch.distributed.all_reduce(shared)
    loss, bad_images, replaced, cache_hits, images = shared.tolist()
    if bad_images > loader.allowed_bad_images:
        # Each rank has counted its own, and one may be another's too: look at the names.
        found = [None] * run.ranks.world_size
        torch.distributed.all_gather_object(found, loader.bad_images)
        loader.check_bad_images({name: reason for part in found for name, reason in part.items()})
    rates = clock.rates(done)
    metrics = {
        "train/loss": loss / run.ranks.world_size,
        "train/lr": lr,
        "train/grad_norm": result.grad_norm(),
        **rates,
        "memory/peak_gib": _peak_gib(run.device),
        "data/replaced_images": int(replaced),
        "faults/skipped_steps": run.events.count("skipped_step"),
        "faults/rollbacks": run.events.count("rollback"),
    }
    if run.recipe.data.cache is not None:
        metrics["data/cache_hits"] = cache_hits / images
    if run.peak_flops:
        metrics["perf/mfu"] = mfu(
            rates["perf/images_per_second"],
            training_flops=run.training_flops,
            peak_flops_per_s=run.peak_flops,
            devices=run.ranks.world_size,
        )
    return metrics


def _peak_gib(device: torch.device) -> float:
    """Most memory held so far: by torch on the GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _due(done: int, every: int | None) -> bool:
    return bool(every) and done % every == 0


def _checkpoint_due(run: Run, done: int) -> bool:
    checkpoint = run.recipe.checkpoint
    epochs = checkpoint.every_epochs
    return _due(done, checkpoint.every_steps) or _due(done, epochs and epochs * run.steps_per_epoch)
