"""The pre-training job: recipe -> index -> model, objective, engine -> loop -> weights and figures."""

import logging
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from data_pipeline.augmentations import augmentation
from data_pipeline.index import Index, load_index, open_index
from data_pipeline.loader import ImageLoader
from mae_scale import __version__
from mae_scale.checkpoints.export import export_weights
from mae_scale.errors import UsageError
from mae_scale.models.mae import build_mae
from mae_scale.models.targets import PcaCoefficients
from mae_scale.objectives.reconstruct import Reconstruct
from mae_scale.planning.flops import PEAK_FLOPS, mae_training_flops
from mae_scale.recipe import Recipe, differing_keys, load_recipe
from mae_scale.tracking.mlflow_tracker import tracking_uri
from mae_scale.tracking.run import Tracking
from mae_scale.training.activation_checkpointing import checkpoint_activations
from mae_scale.training.compilation import compile_blocks
from mae_scale.training.distributed import process_group, ranks_from_environment
from mae_scale.training.ds_config import (
    BatchLayout,
    batch_layout,
    compiles,
    deepspeed_config,
    precision_of,
    refuse_wrong_combinations,
    zero_stage_of,
)
from mae_scale.training.loop import Run, resume, train

log = logging.getLogger("mae_scale")


def check(recipe: Recipe, out: Path, world_size: int) -> None:
    """Everything that can be refused before a rank is started; UsageError says what to do."""
    gpu = torch.cuda.is_available()
    if recipe.data.root is None:
        raise UsageError("data.root is not set; add data.root=/path/to/train (a folder of images or of tar shards)")
    if recipe.engine.backend == "deepspeed":
        deepspeed_config(recipe, batch_layout(recipe, world_size), gpu=gpu)
    refuse_wrong_combinations(recipe, gpu=gpu)
    with torch.device("meta"):
        build_model(recipe)
    _check_output_folder(recipe, out)


def pretrain(recipe: Recipe, out: Path) -> None:
    """Run the job as this process's rank, from where the output folder stands to the end."""
    ranks = ranks_from_environment()
    gpu = torch.cuda.is_available()
    layout = batch_layout(recipe, ranks.world_size)
    if ranks.is_first:
        out.mkdir(parents=True, exist_ok=True)
        recipe.save(out / "recipe.yaml")
        open_images(recipe, out)
    with process_group(ranks, recipe.engine.collective_timeout_s) as device:
        torch.distributed.barrier()
        index = load_index(index_path(recipe, out))
        torch.manual_seed(recipe.seed)
        objective = Reconstruct(build_model(recipe), seed=recipe.seed)
        if recipe.model.target == "pca":
            fit_target(objective, recipe, index)
        engine = scale_out(objective, recipe, layout, device)
        run = Run(recipe, out, ranks, device, layout, index, facts(recipe, engine, index, layout, device))
        start = resume(run, engine)
        with Tracking(run, start, tags(run, engine), engine.config) as tracking:
            tracking.begin(engine.name, start)
            with image_loader(run, start) as loader:
                train(run, engine, objective.tensors, loader, start, tracking)
            finish(run, engine, tracking)
        engine.close()


def index_path(recipe: Recipe, out: Path) -> Path:
    """The index file: data.index, else beside the data, else (data that cannot be written to) in the output folder."""
    root = recipe.data.root
    if recipe.data.index is not None:
        return recipe.data.index
    beside = root / ".mae_scale_index.npz"
    return beside if beside.exists() or os.access(root, os.W_OK) else out / "index.npz"


def open_images(recipe: Recipe, out: Path) -> Index:
    """The up-to-date index of the training images, built or refreshed where needed; says what is left out."""
    return open_index(recipe.data.root, index_path(recipe, out))


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
        bad_image_limit=data.bad_image_limit,
        on_bad_image=data.on_bad_image,
    )


def _check_output_folder(recipe: Recipe, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder (or a name for a new one)")
    if (out / "recipe.yaml").exists():
        different = differing_keys(load_recipe(str(out / "recipe.yaml")), recipe)
        if different:
            raise UsageError(
                f"--out {out} holds a run of another recipe ({'; '.join(different)}); "
                f"start it with its own recipe, or choose another --out"
            )
