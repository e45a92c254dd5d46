"""Pictures of what a pre-training run has learned so far: the same images under the same masks, every few epochs."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others
from mae_scale.files import write_atomically
from mae_scale.models.build import build_model
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.reports.pretraining import reconstruction_figure
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tracking.tracker import Tracking
from mae_scale.training.loop import Run
from mae_scale.training.shown_images import shown_images

IMAGES = 16
NAME = "reconstructions"

log = logging.getLogger("mae_scale")


class Reconstructions:
    """An evaluator that draws; every tracking.reconstruct_every_epochs and at the end of each start.

    DIR/figures/reconstructions/step_00001250.png, the newest also as DIR/figures/reconstructions.png, and in MLflow as
    steps of one figure. All ranks reconstruct, for each may hold a part of the weights. Rank 0 draws, in a thread: a
    picture takes about a second, in which the others would wait.
    """

    def __init__(self, run: Run, engine, tracking: Tracking):
        """All ranks make one. Raises what reading the images raises, on all ranks alike."""
        self._run, self._engine, self._tracking = run, engine, tracking
        self._images = first_then_others(lambda: shown_images(run, IMAGES))
        with torch.device("meta"):  # only its masks are asked for
            self._noise = fixed_noise(Reconstruct(build_model(run.recipe), seed=run.recipe.seed), len(self._images))
        self._painter, self._drawing = ThreadPoolExecutor(1, NAME), Future()
        self._drawing.set_result(None)

    def due(self, done: int) -> bool:
        every = self._run.recipe.tracking.reconstruct_every_epochs * self._run.steps_per_epoch
        return done % every == 0 or done == self._run.last_step

    def __call__(self, done: int) -> dict[str, float]:
        mask, pixels = self._reconstruct()
        if self._run.ranks.is_first:
            self._drawing.result()  # at most one waits to be drawn
            self._drawing = self._painter.submit(self._draw, done, mask, pixels)
            if done == self._run.last_step:
                self._drawing.result()
        return {}

    def _reconstruct(self) -> tuple[torch.Tensor, torch.Tensor]:
        """mask [N, L] and pixels [N, L, p*p*3] of all images, on the host; in micro-batches, as training does."""
        device, size = self._run.device, self._run.layout.micro_batch
        masks, pixels = [], []
        # Eager: these few images must not make compiled blocks be compiled again.
        with torch.compiler.set_stance("force_eager"):
            for part in zip(self._images.split(size), self._noise.split(size), strict=True):
                _, mask, predicted = self._engine.predict(*(tensor.to(device) for tensor in part))
                masks.append(mask.cpu())
                pixels.append(predicted.cpu())
        return torch.cat(masks), torch.cat(pixels)

    def _draw(self, done: int, mask: torch.Tensor, pixels: torch.Tensor) -> None:
        """Rank 0's thread. A picture that cannot be drawn is a warning, and the run goes on."""
        run, figures = self._run, self._run.out / "figures"
        path, newest = figures / NAME / f"step_{done:08d}.png", figures / f"{NAME}.png"
        title = f"epoch {round(done / run.steps_per_epoch, 2):g} of {run.recipe.schedule.epochs}, step {done:,}"
        patch_size = round((pixels.shape[-1] / 3) ** 0.5)
        try:
            reconstruction_figure(self._images, mask, pixels, path, patch_size=patch_size, title=title)
            write_atomically(newest, path.read_bytes())
        except Exception as error:
            log.warning("%s could not be drawn (%s: %s); training goes on", path, type(error).__name__, error)
            return
        self._tracking.figure(path, NAME, done)
        if done == run.last_step:
            self._tracking.artifact(newest, "figures")


def fixed_noise(objective: Reconstruct, count: int) -> torch.Tensor:
    """Mask noise [count, L] on the host, the same at every call of a run."""
    return objective.noise("figure", 0, np.arange(count))


def draw_reconstructions(model: MaskedAutoencoder, recipe: Recipe, images: torch.Tensor, path: Path) -> None:
    """Original, masked and reconstructed: images [N, 3, S, S] as a model on the host sees them."""
    objective = Reconstruct(model, seed=recipe.seed).eval()
    with torch.inference_mode():
        _, mask, pixels = objective(images, fixed_noise(objective, len(images)))
    reconstruction_figure(images, mask, pixels, path, patch_size=model.patch_size)
