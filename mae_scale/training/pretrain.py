"""The pre-training job: recipe -> images -> model, objective, engine -> loop -> weights and figures."""

import os
import platform
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from data_pipeline.augmentations import augmentation
from data_pipeline.index import Index, load_index, open_index
from data_pipeline.loader import ImageLoader
from data_pipeline.order import steps_per_epoch
from data_pipeline.pipelines import decoding_device
from mae_scale.checkpoints.export import checkpoint_model, export_weights
from mae_scale.checkpoints.saver import Saver
from mae_scale.checkpoints.store import Retention, list_checkpoints
from mae_scale.errors import EXIT_DONE, EXIT_STOPPED, UsageError
from mae_scale.models.vit import patchify
from mae_scale.objectives.reconstruct import Reconstruct
from mae_scale.planning.flops import mae_forward_flops, peak_flops_per_s
from mae_scale.recipe import Recipe, differing_keys, load_recipe
from mae_scale.tracking.events import Events
from mae_scale.tracking.figures import loss_curve_figure, reconstruction_figure
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.run import Tracking
from mae_scale.tracking.uri import tracking_uri
from mae_scale.training.assemble import build_model, scale_out
from mae_scale.training.control import Control
from mae_scale.training.distributed import process_group, ranks_from_environment
from mae_scale.training.ds_config import (
    batch_layout,
    deepspeed_config,
    precision_of,
    refuse_wrong_combinations,
    zero_stage_of,
)
from mae_scale.training.loop import Run, resume, train, write_json

FIGURE_IMAGES = 16
PCA_IMAGES = 256


def check(recipe: Recipe, out: Path, world_size: int) -> None:
    """Everything that can be refused before a rank is started; UsageError says what to do."""
    gpu = torch.cuda.is_available()
    if recipe.data.root is None:
        raise UsageError("data.root is not set; add data.root=/path/to/train (a folder of images or of tar shards)")
    refuse_wrong_combinations(recipe, gpu=gpu)
    layout = batch_layout(recipe, world_size)
    if recipe.engine.backend == "deepspeed":
        deepspeed_config(recipe, layout, gpu=gpu)
    decoding_device(recipe.data.device)
    tracking_uri(recipe.tracking.uri, out)
    with torch.device("meta"):
        build_model(recipe)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder (or a name for a new one)")
    if (out / "recipe.yaml").exists():
        different = differing_keys(load_recipe(str(out / "recipe.yaml")), recipe)
        if different:
            raise UsageError(
                f"--out {out} holds a run of another recipe ({'; '.join(different)}); "
                f"start it with its own recipe, or choose another --out"
            )


def prepare(recipe: Recipe, out: Path) -> None:
    """Once a start, before the ranks meet: the output folder, with the recipe and the index of the run's images.

    The index stays what it was at the run's first start, so that a resumed run goes on in the same order; what
    has turned bad since is replaced and counted by the loader.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = out / "index.npz"
        index = load_index(kept, recipe.data.root) if kept.exists() else open_index(recipe.data.root, recipe.data.index)
        steps_per_epoch(len(index), recipe.data.global_batch)  # refuses a batch larger than the data
        if not kept.exists():
            index.save(kept)
        recipe.save(out / "recipe.yaml")
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written to: {error.strerror}") from None


def pretrain(recipe: Recipe, out: Path) -> int:
    """Run the job as this process's rank, from where the output folder stands to the end; the exit code.

    EXIT_DONE, or EXIT_STOPPED after SIGTERM or SIGUSR1 to any rank, when a checkpoint was written.
    """
    ranks = ranks_from_environment()
    layout = batch_layout(recipe, ranks.world_size)
    if ranks.is_first:
        prepare(recipe, out)
    timeout_s = recipe.engine.collective_timeout_s
    with process_group(ranks, timeout_s) as device, Control(ranks, timeout_s) as control:
        index = load_index(out / "index.npz", recipe.data.root)
        torch.manual_seed(recipe.seed)
        objective = Reconstruct(build_model(recipe), seed=recipe.seed)
        if recipe.model.target == "pca":
            fit_target(objective, recipe, index)
        engine = scale_out(objective, recipe, layout, device)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        run = Run(
            recipe,
            out,
            ranks,
            device,
            layout,
            index,
            facts(recipe, engine, index, ranks.world_size),
            forward_flops(recipe),
            peak_flops_per_s(gpu, precision_of(recipe, gpu=True)) if gpu else None,
            control,
            saver(recipe, out),
            Events(out / "events.jsonl"),
        )
        start = resume(run, engine)
        with Tracking(
            recipe,
            out,
            speaks=ranks.is_first,
            start=start,
            total_steps=run.last_step,
            steps_per_epoch=run.steps_per_epoch,
            tags=tags(run),
        ) as tracking:
            tracking.console.message(headline(run, engine, start))
            if ranks.is_first:
                write_json(out / "engine.json", engine.config)
                tracking.artifact(out / "recipe.yaml")
                tracking.artifact(out / "engine.json")
            stopped = None
            if start < run.last_step:
                run.events.add("start", start, world_size=ranks.world_size, engine=engine.name)
                stopped = train(run, engine, objective.tensors, partial(image_loader, run), start, tracking)
            tracking.artifact(run.events.path)
            if stopped:
                tracking.console.message(f"stopped by {stopped}; the same command goes on from the last checkpoint")
            else:
                finish(run, tracking)
        engine.close()
    return EXIT_STOPPED if stopped else EXIT_DONE


def saver(recipe: Recipe, out: Path) -> Saver:
    """What writes the run's checkpoints."""
    checkpoint = recipe.checkpoint
    retention = Retention(checkpoint.keep, checkpoint.keep_every_epochs, checkpoint.keep_best)
    timeout_s = recipe.engine.collective_timeout_s
    return Saver(out / "checkpoints", retention, background=checkpoint.background, timeout_s=timeout_s)


def image_loader(run: Run, start: int) -> ImageLoader:
    """This rank's batches from update `start` on."""
    data = run.recipe.data
    return ImageLoader(
        run.index,
        augmentation(data.augmentation),
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
        bad_image_limit=data.bad_image_limit,
        on_bad_image=data.on_bad_image,
    )


def fit_target(objective: Reconstruct, recipe: Recipe, index: Index) -> None:
    """Fit the PCA target on the patches of the run's first images; the same on every rank and at every start."""
    images = some_images(index, PCA_IMAGES, recipe, recipe.data.augmentation)
    patches = patchify(images, objective.model.patch_size)
    objective.model.target.fit(patches.flatten(0, 1))


def some_images(index: Index, count: int, recipe: Recipe, kind: str) -> torch.Tensor:
    """Up to `count` images [N, 3, S, S] float32 drawn by the recipe's seed, decoded on the CPU."""
    count = min(count, len(index))
    with ImageLoader(
        index,
        augmentation(kind),
        image_size=recipe.model.image_size,
        global_batch=count,
        micro_batch=count,
        seed=recipe.seed,
        device="cpu",
        stop_step=1,
    ) as loader:
        return next(iter(loader)).images


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
        "versions": {name: _version(name) for name in ("mae-scale", "torch", "deepspeed", "fairscale")},
    }


def forward_flops(recipe: Recipe) -> int:
    """Of one image, the way the recipe's model computes."""
    model = recipe.model
    return mae_forward_flops(
        model.name,
        image_size=model.image_size,
        patch_size=model.patch_size,
        width=model.width,
        depth=model.depth,
        mask_ratio=model.mask_ratio,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        way="encoder_mask_tokens" if model.encoder_mask_tokens else "fast",
    )


def tags(run: Run) -> dict[str, str | int | None]:
    """MLflow tags of this start."""
    environment = os.environ
    return {
        "git_commit": _git_commit(),
        "host": platform.node(),
        "world_size": run.ranks.world_size,
        "engine": run.facts["engine"],
        "zero_stage": run.facts["engine"].rpartition(" ")[2] if "ZeRO" in run.facts["engine"] else None,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "slurm_job_id": environment.get("SLURM_JOB_ID"),
        "slurm_array_job_id": environment.get("SLURM_ARRAY_JOB_ID"),
        "slurm_restart_count": environment.get("SLURM_RESTART_COUNT"),
        "slurm_nodes": environment.get("SLURM_JOB_NUM_NODES"),
        "unreadable_images": len(run.index.bad),
    }


def headline(run: Run, engine, start: int) -> str:
    """Two lines on what this start will do."""
    layout, schedule = run.layout, run.recipe.schedule
    whence = f"going on from step {start}" if start else "from the beginning"
    if start == run.last_step:
        whence = f"all {start} steps are done"
    return (
        f"{run.index.summary()}; {run.steps_per_epoch} steps an epoch, {schedule.epochs} epochs, "
        f"{run.total_steps} steps; {whence}\n"
        f"{engine.name}, {layout.world_size} rank(s) on {run.device.type} x {layout.micro_batch} images "
        f"x {layout.accumulation} = global batch {layout.global_batch}; peak lr {run.recipe.lr:.3g}"
    )


def finish(run: Run, tracking: Tracking) -> None:
    """The loss curve; and when the schedule is done, weights and reconstructions. Rank 0 does it, from the files."""
    figures = run.out / "figures"
    if run.ranks.is_first:
        loss_curve_figure(read_metrics(run.out / "metrics.jsonl"), figures / "loss_curve.png")
        tracking.artifact(figures / "loss_curve.png", "figures")
        weights = run.out / "export" / "model.safetensors"
        newest = list_checkpoints(run.checkpoints)[-1][1]
        if run.last_step == run.total_steps and not weights.exists():
            model, _ = checkpoint_model(newest)
            draw_reconstructions(model, run, figures / "reconstructions.png")
            tracking.artifact(figures / "reconstructions.png", "figures")
            export_weights(model, weights, "official")
        done = f"weights in {weights}" if weights.exists() else f"stopped early, checkpoint in {newest}"
        tracking.console.message(f"done: {done}; figures in {figures}")


def draw_reconstructions(model, run: Run, path: Path) -> None:
    """Original, masked and reconstructed: some validation images (training images without data.val_root)."""
    recipe = run.recipe
    root = recipe.data.val_root
    index = run.index if root is None else open_index(root, progress=False)
    images = some_images(index, FIGURE_IMAGES, recipe, "evaluation")
    noise = Reconstruct(model, seed=recipe.seed).noise("figure", 0, np.arange(len(images)))
    with torch.inference_mode():
        output = model(images, noise)
        patches = patchify(images, model.patch_size)
        pixels = model.target.to_pixels(output.prediction, patches)
    reconstruction_figure(images, output.mask, pixels, path, patch_size=model.patch_size)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, where it runs from a repository."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or None if done.returncode == 0 else None
