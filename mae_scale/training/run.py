"""One training job: recipe -> images -> objective, engine -> loop -> what it leaves. Kinds of it fill in the gaps."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data_pipeline.augmentations import augmentation
from data_pipeline.cache import ImageCache
from data_pipeline.index import Index, load_index, open_index
from data_pipeline.loader import ImageLoader
from data_pipeline.pipelines import decoding_device
from mae_scale.checkpoints.save import Saver
from mae_scale.checkpoints.store import Retention, list_checkpoints
from mae_scale.config.schema import Recipe
from mae_scale.distributed import stop_requests
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks, ranks_from_environment
from mae_scale.engines.deepspeed_config import BatchLayout, batch_layout, deepspeed_config
from mae_scale.engines.policy import precision_of, refuse_wrong_combinations, zero_stage_of
from mae_scale.engines.select import scale_out
from mae_scale.errors import EXIT_DONE, EXIT_STOPPED, UsageError
from mae_scale.files import write_json
from mae_scale.planning.hardware import peak_flops_per_s
from mae_scale.reports.pretraining import loss_curve_figure
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_uri import tracking_uri
from mae_scale.tracking.output import Output
from mae_scale.tracking.tracker import Tracking
from mae_scale.training.announcement import headline, nothing_to_do, plan
from mae_scale.training.event_log import Events
from mae_scale.training.inputs import (
    IMAGES,
    RECIPE,
    VALIDATION,
    RunImages,
    has_step,
    is_prepared,
    refuse_other_recipe,
    remove_leftovers,
    run_images,
)
from mae_scale.training.loop import Evaluator, Run, resume, train
from mae_scale.training.provenance import settings_used, start_tags, versions
from mae_scale.training.run_lock import hold
from mae_scale.training.schedule import steps_of


class Job(ABC):
    """A recipe and its output folder; what a kind of training decides is in its subclass."""

    def __init__(self, recipe: Recipe, out: Path, output: Output | None = None):
        self.recipe, self.out = recipe, out
        self.output = output or Output()
        self.events: Events | None = None  # once the run has begun
        self.notes: list[str] = []  # said by rank 0 when the run begins

    @abstractmethod
    def refuse(self, layout: BatchLayout) -> None:
        """UsageError for what this kind of training cannot do."""

    @abstractmethod
    def objective(self, index: Index) -> nn.Module:
        """What is trained, on the host, its weights those of the start; the same on every rank."""

    @abstractmethod
    def check_fit(self, images: Index, validation: Index | None) -> None:
        """Raise UsageError when validation images or starting weights do not fit the training images and the recipe."""

    @abstractmethod
    def training_flops(self) -> int:
        """Of one image, forward and backward."""

    @abstractmethod
    def finish(self, run: Run, tracking: Tracking) -> str:
        """After the whole schedule, on rank 0: weights and pictures, from the files; a line on where they are."""

    def choose_images(self, index: Index) -> Index:
        """What of the images is trained on. UsageError when they do not do."""
        return index

    def describe(self, objective: nn.Module) -> list[str]:
        """Lines on what is trained, said at the start."""
        return []

    def facts(self, index: Index) -> dict:
        """What else a checkpoint's manifest says."""
        return {}

    def evaluator(self, run: Run, engine, tracking: Tracking) -> Evaluator | None:
        """What is measured, or drawn, now and then beside the loss."""
        return None

    def check(self, world_size: int) -> None:
        """Everything that can be refused before a rank is started; UsageError says what to do."""
        recipe, out = self.recipe, self.out
        gpu = torch.cuda.is_available()
        if recipe.data.root is None:
            raise UsageError("data.root is not set; add data.root=/path/to/train (a folder of images or of tar shards)")
        refuse_wrong_combinations(recipe, gpu=gpu)
        layout = batch_layout(recipe, world_size)
        if recipe.engine.backend == "deepspeed":
            deepspeed_config(recipe, layout, gpu=gpu)
        decoding_device(recipe.data.device)
        tracking_uri(recipe.tracking.uri, out)
        self.refuse(layout)
        self.augmentation()
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file, expected a folder (or a name for a new one)")
        refuse_other_recipe(recipe, out)

    def check_inputs(self, *, keep: bool = True) -> dict[str, RunImages]:
        """Read what the run starts from and raise UsageError when it does not fit; nothing is written into --out.

        keep: write the folders' indexes beside them, or into data.index. Returns the images by the names that their
        indexes have in --out. Takes a scan of the folders at a first start, and where they lie elsewhere than at the
        last one. The images stay those of the first start, in the same order; what has turned bad since is replaced and
        counted by the loader.
        """
        data, how = self.recipe.data, {"keep": keep, "progress": not self.output.quiet}
        found = {
            IMAGES: run_images(
                *(self.out, IMAGES, "data.root", data.root),
                lambda: open_index(data.root, data.index, **how),
                self.choose_images,
                part=data.labels_a_class is not None,
            )
        }
        steps_of(self.recipe, len(found[IMAGES].index))  # refuses a batch larger than the data
        if data.val_root is not None:
            found[VALIDATION] = run_images(
                *(self.out, VALIDATION, "data.val_root", data.val_root), lambda: open_index(data.val_root, **how)
            )
        self.check_fit(found[IMAGES].index, found[VALIDATION].index if VALIDATION in found else None)
        return found

    def prepare(self) -> None:
        """Once a start, before the ranks meet: check everything, then write what the ranks read into --out."""
        inputs = self.check_inputs()
        refuse_other_recipe(self.recipe, self.out)  # another start may have come in between
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not has_step(self.out):
                remove_leftovers(self.out, self.recipe)
            for name, images in inputs.items():
                if not images.is_kept:
                    images.index.save(self.out / name)
            self.recipe.save(self.out / RECIPE)
        except OSError as error:
            raise UsageError(f"--out {self.out} cannot be written to: {error.strerror}") from None

    def plan(self, world_size: int) -> list[str]:
        """Check everything and return what a start on so many ranks would do; nothing is written."""
        index = self.check_inputs(keep=False)[IMAGES].index
        layout = batch_layout(self.recipe, world_size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        used = settings_used(self.recipe, layout, device)
        return plan(self.recipe, self.out, index, layout, steps_of(self.recipe, len(index)), used, device)

    def run(self) -> int:
        """Run as this process's rank, from where the output folder stands to the end; the exit code.

        EXIT_DONE, or EXIT_STOPPED after SIGTERM, SIGUSR1 or Ctrl-C to any rank, when a checkpoint was written.
        """
        ranks = ranks_from_environment()
        with hold(self.out) if ranks.is_first else contextlib.nullcontext() as lock, self._failure_is_noted():
            return self._run(ranks, lock.check if lock else None)

    @contextlib.contextmanager
    def _failure_is_noted(self) -> Iterator[None]:
        """Close the start in events.jsonl when it fails after it has begun, at the last step that was logged."""
        try:
            yield
        except BaseException as error:
            if self.events is not None:
                rows = read_metrics(self.out / "metrics.jsonl")
                self.events.fail(rows[-1]["step"] if rows else 0, error)
            raise

    def _run(self, ranks: Ranks, guard: Callable[[], None] | None) -> int:
        recipe, out = self.recipe, self.out
        layout = batch_layout(recipe, ranks.world_size)
        if ranks.is_first and not is_prepared(out, recipe):
            self.prepare()
        timeout_s = recipe.engine.collective_timeout_s
        with process_group(ranks, timeout_s) as device, Control(ranks, timeout_s) as control:
            # Now that the ranks have met, none leaves by itself.
            stop_requests.heed("this step is ended and a checkpoint written")
            index = load_index(out / IMAGES, recipe.data.root)
            torch.manual_seed(recipe.seed)
            objective = self.objective(index)
            self.notes += self.describe(objective)
            engine = scale_out(objective, recipe, layout, device)
            gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
            run = Run(
                recipe,
                out,
                ranks,
                device,
                layout,
                index,
                facts(recipe, engine, index, ranks.world_size) | self.facts(index),
                self.training_flops(),
                peak_flops_per_s(gpu, precision_of(recipe, gpu=True)) if gpu else None,
                control,
                saver(recipe, out, guard),
                Events(out / "events.jsonl"),
            )
            self.events = run.events
            stopped = self._train(run, engine, objective, guard)
            engine.close()
        return EXIT_STOPPED if stopped else EXIT_DONE

    def _train(self, run: Run, engine, objective: nn.Module, guard: Callable[[], None] | None) -> str | None:
        """Train from where the run stands, tracked; the signal that asked to stop, or None at the end."""
        recipe, out, events = run.recipe, run.out, run.events
        start = resume(run, engine)
        used = settings_used(recipe, run.layout, run.device)
        with Tracking(
            recipe,
            out,
            speaks=run.ranks.is_first,
            start=start,
            total_steps=max(start, run.last_step),
            steps_per_epoch=run.steps_per_epoch,
            used=used,
            tags=start_tags(run.facts, run.device, len(run.index.bad)),
            output=self.output,
            guard=guard,
        ) as tracking:
            said = headline(recipe, run.index, run.layout, run.steps, used, run.device, start)
            tracking.console.message("\n".join([said, *self.notes]))
            if run.ranks.is_first:
                write_json(out / "engine.json", {"used": used, **engine.config})
                tracking.artifact(out / RECIPE)
                tracking.artifact(out / "engine.json")
            events.add("start", start, world_size=run.ranks.world_size, engine=engine.name)
            stopped = None
            if start < run.last_step:
                loader, evaluate = partial(self.image_loader, run, objective), self.evaluator(run, engine, tracking)
                stopped = train(run, engine, objective.tensors, loader, start, tracking, evaluate)
            again = "goes on from the last checkpoint" if list_checkpoints(run.checkpoints) else "begins again"
            last = f"stopped by {stopped}; the same command {again}"
            if not stopped:
                how, last = self._end(run, start, tracking) if run.ranks.is_first else ("", "")
                events.add("end", max(start, run.last_step), reason=how)
            tracking.artifact(events.path)
            tracking.console.conclude(last)
        return stopped

    def _end(self, run: Run, start: int, tracking: Tracking) -> tuple[str, str]:
        """The loss curve, and when the schedule is done what the kind of training leaves; how it ended, and a line."""
        figures = run.out / "figures"
        loss_curve_figure(read_metrics(run.out / "metrics.jsonl"), figures / "loss_curve.png")
        tracking.artifact(figures / "loss_curve.png", "figures")
        if max(start, run.last_step) == run.total_steps:
            return "done", f"done: {self.finish(run, tracking)}; figures in {figures}"
        if start < run.last_step:
            return "stopped early", f"done: stopped early, checkpoints in {run.checkpoints}; figures in {figures}"
        return "nothing to do", nothing_to_do(run.recipe, run.steps, start)

    def augmentation(self):
        """The recipe's."""
        data = self.recipe.data
        return augmentation(data.augmentation, crop_scale=data.crop_scale, flip=data.flip, erasing=data.random_erasing)

    def image_loader(self, run: Run, objective: nn.Module, start: int) -> ImageLoader:
        """This rank's batches from update `start` on, with what the objective draws for them."""
        data = run.recipe.data
        return ImageLoader(
            run.index,
            self.augmentation(),
            image_size=run.recipe.model.image_size,
            global_batch=data.global_batch,
            micro_batch=run.layout.micro_batch,
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
            seed=run.recipe.seed,
            device=data.device,
            device_id=run.ranks.local_rank,
            threads=data.threads,
            start_step=start,
            stop_step=run.last_step,
            batch_of=run.events.batch_of,
            draw=objective.draw,
            bad_image_limit=data.bad_image_limit,
            on_bad_image=data.on_bad_image,
            exif_orientation=data.exif_orientation,
            cache=None if data.cache is None else ImageCache(data.cache, run.index, limit_gib=data.cache_gib),
        )


def saver(recipe: Recipe, out: Path, guard: Callable[[], None] | None) -> Saver:
    """What writes the run's checkpoints; guard: of the run's lock, on rank 0."""
    checkpoint = recipe.checkpoint
    retention = Retention(checkpoint.keep, checkpoint.keep_every_epochs, checkpoint.keep_best)
    timeout_s = recipe.engine.collective_timeout_s
    return Saver(out / "checkpoints", retention, background=checkpoint.background, timeout_s=timeout_s, guard=guard)


def facts(recipe: Recipe, engine, index: Index, world_size: int) -> dict:
    """What a checkpoint's manifest says of the run."""
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
