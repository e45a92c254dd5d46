"""Figures of images and of what the decoder makes of their words, while a dVAE is trained."""

import torch

from mae_scale.distributed.collectives import first_then_others
from mae_scale.engines.base import Engine
from mae_scale.reports.pretraining import words_figure
from mae_scale.tasks.step_figures import StepFigures
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.shown_images import shown_images

IMAGES = 16


class WordReconstructions:
    """An evaluator that draws images and their pictures through the most probable words (StepFigures).

    All ranks reconstruct, for each may hold a part of the weights; rank 0 draws.
    """

    def __init__(self, context: RunContext, engine: Engine, tracker: Tracker):
        """Read the images to draw. All ranks make one; an error in reading is raised on all of them."""
        self._context, self._engine, self._figures = context, engine, StepFigures(context, tracker)
        self._images = first_then_others(lambda: shown_images(context, IMAGES))

    def due(self, done: int) -> bool:
        return self._figures.due(done)

    def __call__(self, done: int) -> dict[str, float]:
        context, parts = self._context, []
        with torch.compiler.set_stance("force_eager"):
            for images in self._images.split(context.layout.micro_batch):
                parts.append(self._engine.predict(images.to(context.device))[2].cpu())
        pictures = torch.cat(parts)
        if context.ranks.is_first:
            self._figures.draw(done, lambda path, title: words_figure(self._images, pictures, path, title=title))
        return {}
