"""Figures of images and of what the decoder makes of their words, while a dVAE is trained."""

import logging

import torch

from data_pipeline.files import write_atomically
from mae_scale.distributed.collectives import first_then_others
from mae_scale.engines.base import Engine
from mae_scale.reports.pretraining import words_figure
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.shown_images import shown_images

IMAGES = 16
NAME = "reconstructions"

log = logging.getLogger("mae_scale")


class WordReconstructions:
    """An evaluator that draws images and their pictures through the most probable words.

    Every tracking.reconstruct_every_epochs and at the end of each start: DIR/figures/reconstructions/step_00001250.png,
    the newest also as DIR/figures/reconstructions.png, and in MLflow as steps of one figure. All ranks reconstruct, for
    each may hold a part of the weights; rank 0 draws.
    """

    def __init__(self, context: RunContext, engine: Engine, tracker: Tracker):
        """Read the images to draw. All ranks make one; an error in reading is raised on all of them."""
        self._context, self._engine, self._tracker = context, engine, tracker
        self._images = first_then_others(lambda: shown_images(context, IMAGES))

    def due(self, done: int) -> bool:
        every = self._context.recipe.tracking.reconstruct_every_epochs * self._context.steps.per_epoch
        return done % every == 0 or done == self._context.steps.last

    def __call__(self, done: int) -> dict[str, float]:
        context, pictures = self._context, []
        with torch.compiler.set_stance("force_eager"):
            for images in self._images.split(context.layout.micro_batch):
                pictures.append(self._engine.predict(images.to(context.device))[2].cpu())
        if context.ranks.is_first:
            self._draw(done, torch.cat(pictures))
        return {}

    def _draw(self, done: int, pictures: torch.Tensor) -> None:
        """Draw one figure; a failure is a warning, and training goes on."""
        context, figures = self._context, self._context.out / "figures"
        path, newest = figures / NAME / f"step_{done:08d}.png", figures / f"{NAME}.png"
        title = f"epoch {round(done / context.steps.per_epoch, 2):g} of {context.recipe.schedule.epochs}, step {done:,}"
        try:
            words_figure(self._images, pictures, path, title=title)
            write_atomically(newest, path.read_bytes())
        except Exception as error:
            log.warning("%s could not be drawn (%s: %s); training goes on", path, type(error).__name__, error)
            return
        self._tracker.figure(path, NAME, done)
        if done == context.steps.last:
            self._tracker.artifact(newest, "figures")
