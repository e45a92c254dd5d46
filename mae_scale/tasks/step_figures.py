"""A figure that is drawn again and again while a run trains."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_pipeline.files import write_atomically
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext

NAME = "reconstructions"

log = logging.getLogger("mae_scale")


class StepFigures:
    """Draws a figure every tracking.reconstruct_every_epochs and at the end of each start, on rank 0.

    DIR/figures/reconstructions/step_00001250.png, the newest also as DIR/figures/reconstructions.png, and in MLflow as
    steps of one figure. In a thread: a picture takes about a second, in which the other ranks would wait.
    """

    def __init__(self, context: RunContext, tracker: Tracker):
        self._context, self._tracker = context, tracker
        self._painter, self._drawing = ThreadPoolExecutor(1, NAME), Future[None]()
        self._drawing.set_result(None)

    def due(self, done: int) -> bool:
        """Return whether it is to be drawn after update `done`."""
        every = self._context.recipe.tracking.reconstruct_every_epochs * self._context.steps.per_epoch
        return done % every == 0 or done == self._context.steps.last

    def draw(self, done: int, paint: Callable[[Path, str], None]) -> None:
        """Draw by paint(path, title); returns before it is drawn, but at the end of a start. On rank 0 alone."""
        self._drawing.result()  # at most one waits to be drawn
        self._drawing = self._painter.submit(self._draw, done, paint)
        if done == self._context.steps.last:
            self._drawing.result()

    def _draw(self, done: int, paint: Callable[[Path, str], None]) -> None:
        """Draw one figure; a failure is a warning, and training goes on."""
        context, figures = self._context, self._context.out / "figures"
        path, newest = figures / NAME / f"step_{done:08d}.png", figures / f"{NAME}.png"
        title = f"epoch {round(done / context.steps.per_epoch, 2):g} of {context.recipe.schedule.epochs}, step {done:,}"
        try:
            paint(path, title)
            write_atomically(newest, path.read_bytes())
        except Exception as error:
            log.warning("%s could not be drawn (%s: %s); training goes on", path, type(error).__name__, error)
            return
        self._tracker.figure(path, NAME, done)
        if done == context.steps.last:
            self._tracker.artifact(newest, "figures")
