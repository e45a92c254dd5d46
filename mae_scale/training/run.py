"""One start of a run, from top to bottom: check, meet, build, start from, scale out, resume, train, conclude."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_pipeline.batch_order import TrainingOrder
from data_pipeline.cache import ImageCache
from data_pipeline.errors import EXIT_DONE, EXIT_STOPPED
from data_pipeline.files import write_json
from data_pipeline.index import Index, load_index
from data_pipeline.loader import ImageLoader
from mae_scale.checkpoints.save import Saver
from mae_scale.checkpoints.store import Retention, list_checkpoints
from mae_scale.config.schema import Recipe
from mae_scale.distributed import stop_requests
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks, ranks_from_environment
from mae_scale.engines.base import Engine, Objective
from mae_scale.engines.deepspeed_templates import zero_stage_of
from mae_scale.engines.policy import layout_of, precision_of
from mae_scale.engines.select import scale_out
from mae_scale.planning.hardware import peak_flops_per_s
from mae_scale.reports.pretraining import loss_curve_figure
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.output import Output
from mae_scale.tracking.tracker import RunFacts, Tracker
from mae_scale.training.announcement import headline, nothing_to_do
from mae_scale.training.context import RunContext
from mae_scale.training.decoding import bad_image_policy, decoding_of
from mae_scale.training.event_log import Events
from mae_scale.training.inputs import IMAGES, RECIPE, is_prepared
from mae_scale.training.loop import Loop, resume
from mae_scale.training.planned import over_plan, over_plan_line, planned
from mae_scale.training.preflight import prepare, training_augmentation
from mae_scale.training.provenance import environment, settings_used, start_tags, versions
from mae_scale.training.run_lock import hold
from mae_scale.training.run_page import run_page
from mae_scale.training.self_check import Course, SelfCheck, Untrained
from mae_scale.training.system_metrics import SystemMetrics
from mae_scale.training.task import Origin, Task

log = logging.getLogger("mae_scale")

Guard = Callable[[], None]
"""Ends this process when another start has taken the run's folder over; called before something is written."""


def run(task: Task[Any], output: Output) -> int:
    """Run the task as this process's rank, from where its output folder stands to the end; return the exit code.

    EXIT_DONE, or EXIT_STOPPED after SIGTERM, SIGUSR1 or Ctrl-C to any rank, when a checkpoint was written.
    """
    recipe, out, ranks = task.recipe, task.out, ranks_from_environment()
    timeout_s = recipe.engine.collective_timeout_s
    with _held(out, ranks) as guard, _FailureNote(out) as failure:
        if ranks.is_first and not is_prepared(out, recipe):
            prepare(task, progress=not output.quiet)
        with process_group(ranks, timeout_s) as device, Control(ranks, timeout_s) as control:
            # Now that the ranks have met, none leaves by itself.
            stop_requests.heed("this step is ended and a checkpoint written")
            index = load_index(out / IMAGES, recipe.data.root)
            torch.manual_seed(recipe.seed)
            objective = task.build(index)
            origin = task.initialise(objective, index)
            notes = [*origin.notes, *task.describe(objective)]
            engine = scale_out(objective, recipe, layout_of(recipe, ranks.world_size), device)
            context = _context(task, control, index, engine, device=device, ranks=ranks, origin=origin, guard=guard)
            failure.events = context.events
            start = resume(context, engine)
            with _tracker(task, context, start, output, guard=guard) as tracker:
                _begin(context, engine, tracker, start, notes)
                stopped = _train(task, context, engine, objective, tracker=tracker, start=start)
                _conclude(task, context, tracker, start, stopped)
            engine.close()
    return EXIT_STOPPED if stopped else EXIT_DONE


@contextlib.contextmanager
def _held(out: Path, ranks: Ranks) -> Iterator[Guard | None]:
    """Hold the lock of the run's folder on rank 0; yields what guards it there."""
    if not ranks.is_first:
        yield None
        return
    with hold(out) as lock:
        yield lock.check


class _FailureNote:
    """Closes the start in events.jsonl when it fails after it has begun, at the last step that was logged."""

    def __init__(self, out: Path):
        self._metrics = out / "metrics.jsonl"
        self.events: Events | None = None  # once the run has begun

    def __enter__(self) -> "_FailureNote":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self.events is not None:
            rows = read_metrics(self._metrics)
            self.events.fail(rows[-1]["step"] if rows else 0, error)


def _context(
    task: Task[Any],
    control: Control,
    index: Index,
    engine: Engine,
    *,
    device: torch.device,
    ranks: Ranks,
    origin: Origin,
    guard: Guard | None,
) -> RunContext:
    recipe, out = task.recipe, task.out
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return RunContext(
        recipe=recipe,
        out=out,
        ranks=ranks,
        device=device,
        layout=layout_of(recipe, ranks.world_size),
        index=index,
        facts=_facts(recipe, engine, index, ranks.world_size) | origin.facts,
        training_flops=task.training_flops(),
        peak_flops_per_s=peak_flops_per_s(gpu, precision_of(recipe, gpu=True)) if gpu else None,
        control=control,
        saver=_saver(recipe, out, guard),
        events=Events(out / "events.jsonl"),
    )


def _facts(recipe: Recipe, engine: Engine, index: Index, world_size: int) -> dict[str, Any]:
    """Return the facts about the run that a checkpoint's manifest holds."""
    return {
        "world_size": world_size,
        "engine": engine.name,
        "zero_stage": zero_stage_of(recipe),
        "precision": precision_of(recipe, gpu=torch.cuda.is_available()),
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest(),
        "index": index.digest(),
        "versions": versions(),
    }


def _saver(recipe: Recipe, out: Path, guard: Guard | None) -> Saver:
    checkpoint = recipe.checkpoint
    retention = Retention(checkpoint.keep, checkpoint.keep_every_epochs, checkpoint.keep_best)
    timeout_s = recipe.engine.collective_timeout_s
    return Saver(out / "checkpoints", retention, background=checkpoint.background, timeout_s=timeout_s, guard=guard)


def _tracker(task: Task[Any], context: RunContext, start: int, output: Output, *, guard: Guard | None) -> Tracker:
    facts = RunFacts(
        start=start,
        total_steps=max(start, context.steps.last),
        steps_per_epoch=context.steps.per_epoch,
        used=settings_used(context.recipe, context.layout, context.device),
        tags=start_tags(context.facts, context.device, len(context.index.bad)) | {"mae_scale.task": task.kind},
        page=run_page(task, context) if context.ranks.is_first else None,
        planned=_planned(task, context) if context.ranks.is_first else {},
    )
    return Tracker(context.recipe, context.out, facts, speaks=context.ranks.is_first, output=output, guard=guard)


def _planned(task: Task[Any], context: RunContext) -> dict[str, float]:
    """Return what the start is planned to take; a run does not fail because that cannot be told."""
    try:
        return planned(task, context)
    except Exception as error:
        log.warning("what this start takes cannot be planned (%s: %s)", type(error).__name__, error)
        return {}


def _begin(context: RunContext, engine: Engine, tracker: Tracker, start: int, notes: list[str]) -> None:
    """Print the headline, and write the settings that this start uses."""
    recipe, out = context.recipe, context.out
    said = headline(recipe, context.index, context.layout, context.device, start)
    tracker.console.message("\n".join([said, *notes]))
    if context.ranks.is_first:
        used = settings_used(recipe, context.layout, context.device)
        write_json(out / "engine.json", {"used": used, **engine.config})
        tracker.artifact(out / RECIPE)
        tracker.artifact(out / "engine.json")
    where = environment(context.facts, context.device) if context.ranks.is_first else {}
    context.events.add("start", start, world_size=context.ranks.world_size, engine=engine.name, **where)


def _train(
    task: Task[Any], context: RunContext, engine: Engine, objective: Objective, *, tracker: Tracker, start: int
) -> str | None:
    """Train from step `start` on; return the signal that asked to stop, or None at the end."""
    if start >= context.steps.last:
        return None
    loop = Loop(
        context,
        engine,
        objective.tensors,
        tracker=tracker,
        evaluators=task.evaluators(context, engine, tracker),
        self_check=SelfCheck(context, tracker, _course(task, context, objective)),
        system=SystemMetrics(context.ranks, context.device),
    )
    return loop.train(start, lambda step: _open_loader(task, context, objective, step))


def _course(task: Task[Any], context: RunContext, objective: Objective) -> Course:
    steps = context.steps

    @cache
    def untrained() -> Untrained | None:
        try:
            return task.untrained_loss(context, objective)
        except Exception as error:
            log.warning("the loss of an untrained model is not known (%s: %s)", type(error).__name__, error)
            return None

    return Course(
        steps_per_epoch=steps.per_epoch,
        warmup_steps=round(context.recipe.schedule.warmup_epochs * steps.per_epoch),
        total_steps=steps.total,
        learns_steadily=task.command == "pretrain",
        untrained=untrained,
    )


def _open_loader(task: Task[Any], context: RunContext, objective: Objective, start: int) -> ImageLoader:
    """Return this rank's batches from update `start` on, with what the objective draws for them."""
    recipe, data = context.recipe, context.recipe.data
    order = TrainingOrder(
        context.layout,
        rank=context.ranks.rank,
        seed=recipe.seed,
        start_step=start,
        stop_step=context.steps.last,
        batch_of=context.events.batch_of,
    )
    return ImageLoader(
        context.index,
        order,
        decoding_of(recipe, training_augmentation(recipe), context.ranks, task.second_view()),
        draw=objective.draw,
        annotate=task.annotate(context.index),
        bad_images=bad_image_policy(recipe),
        cache=None if data.cache is None else ImageCache(data.cache, context.index, limit_gib=data.cache_gib),
    )


def _conclude(task: Task[Any], context: RunContext, tracker: Tracker, start: int, stopped: str | None) -> None:
    """Write the start's figures and weights, close its events, and print its last line."""
    if stopped:
        again = "goes on from the last checkpoint" if list_checkpoints(context.checkpoints) else "begins again"
        last = f"stopped by {stopped}; the same command {again}"
    else:
        reason, last = _end(task, context, tracker, start) if context.ranks.is_first else ("", "")
        has_trained = context.ranks.is_first and start < context.steps.last
        plan = over_plan(read_metrics(context.out / "metrics.jsonl")) if has_trained else {}
        facts = {"plan": plan} if plan else {}
        context.events.add("end", max(start, context.steps.last), reason=reason, **facts, **_saving(context))
        if plan:
            tracker.console.message(over_plan_line(plan))
    tracker.artifact(context.events.path)
    tracker.console.conclude(last)


def _saving(context: RunContext) -> dict[str, Any]:
    """Return what saving has cost this start: saves, their median stall, the recipe's steps from one to the next."""
    stalls, checkpoint, steps = [save.stall_s for save in context.saver.times], context.recipe.checkpoint, context.steps
    if not stalls:
        return {}
    intervals = (checkpoint.every_steps, checkpoint.every_epochs and checkpoint.every_epochs * steps.per_epoch)
    every = min((interval for interval in intervals if interval), default=steps.total)
    return {"saves": len(stalls), "save_stall_s": round(median(stalls), 6), "steps_per_save": min(every, steps.total)}


def _end(task: Task[Any], context: RunContext, tracker: Tracker, start: int) -> tuple[str, str]:
    """Draw the loss curve, and when the schedule is done let the task finish; return how it ended, and a line."""
    figures, steps = context.out / "figures", context.steps
    loss_curve_figure(read_metrics(context.out / "metrics.jsonl"), figures / "loss_curve.png")
    tracker.artifact(figures / "loss_curve.png", "figures")
    if max(start, steps.last) == steps.total:
        return "done", f"done: {task.finish(context, tracker)}; figures in {figures}"
    if start < steps.last:
        return "stopped early", f"done: stopped early, checkpoints in {context.checkpoints}; figures in {figures}"
    return "nothing to do", nothing_to_do(context.recipe, steps, start)
