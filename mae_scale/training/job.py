"""One training job: recipe -> images -> objective, engine -> loop -> what it leaves. Kinds of it fill in the gaps."""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data_pipeline.augmentations import augmentation
from data_pipeline.cache import ImageCache
from data_pipeline.index import Index, load_index, open_index
from data_pipeline.loader import ImageLoader
from data_pipeline.order import steps_per_epoch
from data_pipeline.pipelines import decoding_device
from mae_scale.checkpoints.saver import Saver
from mae_scale.checkpoints.store import Retention
from mae_scale.errors import EXIT_DONE, EXIT_STOPPED, UsageError
from mae_scale.files import write_json
from mae_scale.planning.flops import peak_flops_per_s
from mae_scale.recipe import Recipe, differing_keys, load_recipe
from mae_scale.tracking.events import Events
from mae_scale.tracking.figures import loss_curve_figure
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.run import Tracking
from mae_scale.tracking.uri import tracking_uri
from mae_scale.training.assemble import scale_out
from mae_scale.training.control import Control
from mae_scale.training.distributed import process_group, ranks_from_environment
from mae_scale.training.ds_config import (
    BatchLayout,
    batch_layout,
    deepspeed_config,
    precision_of,
    refuse_wrong_combinations,
    zero_stage_of,
)
from mae_scale.training.inputs import (
    IMAGES,
    RECIPE,
    VALIDATION,
    RunImages,
    has_step,
    is_prepared,
    remove_leftovers,
    run_images,
)
from mae_scale.training.loop import Evaluator, Run, resume, train
from mae_scale.training.provenance import describe_settings, settings_used, start_tags, versions


class Job(ABC):
    """A recipe and its output folder; what a kind of training decides is in its subclass."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
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

    def evaluator(self, run: Run, engine) -> Evaluator | None:
        """What is measured now and then beside the loss."""
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
        if (out / RECIPE).exists() and has_step(out):
            different = differing_keys(load_recipe(str(out / RECIPE)), recipe)
            if different:
                raise UsageError(
                    f"--out {out} holds a run of another recipe ({'; '.join(different)}); "
                    f"start it with its own recipe, or choose another --out"
                )

    def check_inputs(self) -> dict[str, RunImages]:
        """Read what the run starts from and raise UsageError when it does not fit; nothing is written into --out.

        Returns the images by the names that their indexes have there. Takes a scan of the folders at a first start, and
        where they lie elsewhere than at the last one. The images stay those of the first start, in the same order; what
        has turned bad since is replaced and counted by the loader.
        """
        data = self.recipe.data
        found = {}
        found[IMAGES] = run_images(
            *(self.out, IMAGES, "data.root", data.root),
            lambda: self.choose_images(open_index(data.root, data.index)),
            part=data.labels_a_class is not None,
        )
        steps_per_epoch(len(found[IMAGES].index), data.global_batch)  # refuses a batch larger than the data
        if data.val_root is not None:
            found[VALIDATION] = run_images(
                *(self.out, VALIDATION, "data.val_root", data.val_root), lambda: open_index(data.val_root), part=False
            )
        self.check_fit(found[IMAGES].index, found[VALIDATION].index if VALIDATION in found else None)
        return found

    def prepare(self) -> None:
        """Once a start, before the ranks meet: check everything, then write what the ranks read into --out."""
        inputs = self.check_inputs()
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

    def run(self) -> int:
        """Run as this process's rank, from where the output folder stands to the end; the exit code.

        EXIT_DONE, or EXIT_STOPPED after SIGTERM or SIGUSR1 to any rank, when a checkpoint was written.
        """
        recipe, out = self.recipe, self.out
        ranks = ranks_from_environment()
        layout = batch_layout(recipe, ranks.world_size)
        if ranks.is_first and not is_prepared(out, recipe):
            self.prepare()
        timeout_s = recipe.engine.collective_timeout_s
        with process_group(ranks, timeout_s) as device, Control(ranks, timeout_s) as control:
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
                saver(recipe, out),
                Events(out / "events.jsonl"),
            )
            start = resume(run, engine)
            used = settings_used(recipe, layout, device)
            with Tracking(
                recipe,
                out,
                speaks=ranks.is_first,
                start=start,
                total_steps=run.last_step,
                steps_per_epoch=run.steps_per_epoch,
                used=used,
                tags=start_tags(run.facts, device, len(index.bad)),
            ) as tracking:
                tracking.console.message("\n".join([headline(run, engine, start, used), *self.notes]))
                if ranks.is_first:
                    write_json(out / "engine.json", {"used": used, **engine.config})
                    tracking.artifact(out / RECIPE)
                    tracking.artifact(out / "engine.json")
                stopped = None
                if start < run.last_step:
                    run.events.add("start", start, world_size=ranks.world_size, engine=engine.name)
                    loader = partial(self.image_loader, run, objective)
                    stopped = train(
                        run, engine, objective.tensors, loader, start, tracking, self.evaluator(run, engine)
                    )
                tracking.artifact(run.events.path)
                if stopped:
                    tracking.console.message(f"stopped by {stopped}; the same command goes on from the last checkpoint")
                elif ranks.is_first:
                    tracking.console.message(self._end(run, tracking))
            engine.close()
        return EXIT_STOPPED if stopped else EXIT_DONE

    def _end(self, run: Run, tracking: Tracking) -> str:
        """The loss curve; and when the schedule is done, what the kind of training leaves."""
        figures = run.out / "figures"
        loss_curve_figure(read_metrics(run.out / "metrics.jsonl"), figures / "loss_curve.png")
        tracking.artifact(figures / "loss_curve.png", "figures")
        if run.last_step < run.total_steps:
            return f"done: stopped early, checkpoints in {run.checkpoints}; figures in {figures}"
        return f"done: {self.finish(run, tracking)}; figures in {figures}"

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
            cache=None if data.cache is None else ImageCache(data.cache, run.index, limit_gib=data.cache_gib),
        )


def saver(recipe: Recipe, out: Path) -> Saver:
    """What writes the run's checkpoints."""
    checkpoint = recipe.checkpoint
    retention = Retention(checkpoint.keep, checkpoint.keep_every_epochs, checkpoint.keep_best)
    timeout_s = recipe.engine.collective_timeout_s
    return Saver(out / "checkpoints", retention, background=checkpoint.background, timeout_s=timeout_s)


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


def headline(run: Run, engine, start: int, used: dict) -> str:
    """Two lines on what this start will do."""
    layout, schedule = run.layout, run.recipe.schedule
    whence = f"going on from step {start}" if start else "from the beginning"
    if start == run.last_step:
        whence = f"all {start} steps are done"
    return (
        f"{run.index.summary()}; {run.steps_per_epoch} steps an epoch, {schedule.epochs} epochs, "
        f"{run.total_steps} steps; {whence}\n"
        f"{engine.name}, {layout.world_size} rank(s) on {run.device.type} x {layout.micro_batch} images "
        f"x {layout.accumulation} = global batch {layout.global_batch}; {describe_settings(used)}; "
        f"peak lr {run.recipe.lr:.3g}"
    )
