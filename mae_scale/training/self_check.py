"""The warnings that a run gives of itself: each kind once in a run, with the likely key.

Each check looks at the run's own logged rows (tracking.metrics_log) and says nothing of a run that is as it should be:
tests hold them against the reference curves of the packaged recipes.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext

log = logging.getLogger("mae_scale")

Row = Mapping[str, Any]

RISING_WINDOWS, RISING_HISTORY, RISING_ROWS, RISING_SHARE = 5, 20, 10, 0.05
SPIKE_SHARE, SPIKE_ROWS, SPIKE_HISTORY = 0.05, 3, 50
NORM_FACTOR, NORM_ROWS, NORM_HISTORY = 10.0, 3, (30, 200)
WAIT_SHARE, WAIT_ROWS, WAIT_STEPS = 0.10, 20, 100
TAG = "mae_scale.warning."
FEWEST_STEPS = 10
"""Least number of steps whose mean loss is looked at."""


@dataclass(frozen=True)
class Untrained:
    """The loss of a model that does not look at the image."""

    loss: float
    name: str
    """Such as `ln(1000)`."""
    tolerance: float
    """Share of that loss that counts as the same."""


@dataclass(frozen=True)
class Course:
    """What the checks must know of a run beside its rows."""

    steps_per_epoch: int
    warmup_steps: int
    total_steps: int
    learns_steadily: bool
    """Whether a rising loss is wrong: in pre-training; a classifier's may rise with mixing and small data."""
    untrained: Callable[[], Untrained | None]
    """Called once the warm-up is over."""


def untrained_loss(rows: Sequence[Row], course: Course) -> str | None:
    """Return what is wrong when an epoch after the warm-up the loss is still that of a model that sees nothing."""
    epoch = _last(rows, max(course.steps_per_epoch, FEWEST_STEPS), after=course.warmup_steps)
    untrained = course.untrained() if epoch else None
    if not epoch or untrained is None:
        return None
    loss = statistics.fmean(epoch)
    if loss < untrained.loss - untrained.tolerance * abs(untrained.loss):
        return None
    how = "above" if loss > untrained.loss else "close to"
    return (
        f"train/loss was {loss:.4g} in the last epoch, {how} {untrained.name} = {untrained.loss:.4g}, what a model "
        "gives that does not look at the images; optim.base_lr is likely too high (or far too low) for these data"
    )


def rising_loss(rows: Sequence[Row], course: Course) -> str | None:
    """Return what is wrong when the loss of pre-training has risen for a long time."""
    if not course.learns_steadily:
        return None
    every = (rows[-1]["step"] - rows[0]["step"]) // max(1, len(rows) - 1)
    window = max(course.steps_per_epoch, course.total_steps // 100, FEWEST_STEPS, RISING_ROWS * every)
    means: list[float] = []  # of windows, the newest first
    while len(means) < RISING_HISTORY and (values := _last(rows, window, len(means), after=course.warmup_steps)):
        means.append(statistics.fmean(values))
    newest, before = means[:RISING_WINDOWS], means[RISING_WINDOWS:]
    if not before or min(newest) < min(before) + RISING_SHARE * abs(min(before)):  # a likelihood's may be negative
        return None
    return (
        f"train/loss has been higher for {RISING_WINDOWS * window / course.steps_per_epoch:.3g} epochs than it was "
        f"before: {newest[0]:.4g}, and it was {min(before):.4g}; optim.base_lr is likely too high; go on with a "
        "smaller one or optim.clip_grad_norm from an earlier checkpoint"
    )


def loss_spike(rows: Sequence[Row], course: Course) -> str | None:
    """Return what is wrong when the loss of pre-training has jumped above all that was logged of late.

    Such jumps are what Chen et al. (arXiv 2104.02057, section 4) saw when a ViT learned by contrast became unstable:
    training goes on, and the accuracy is lower at its end.
    """
    if not course.learns_steadily:
        return None
    newest = rows[-SPIKE_HISTORY - SPIKE_ROWS :]
    losses = [row["train/loss"] for row in newest if row["step"] > course.warmup_steps]
    losses = [loss for loss in losses if math.isfinite(loss)]
    before, newest_losses = losses[:-SPIKE_ROWS], losses[-SPIKE_ROWS:]
    if len(before) < SPIKE_HISTORY or min(newest_losses) <= max(before) + SPIKE_SHARE * abs(max(before)):
        return None
    return (
        f"train/loss is {min(newest_losses):.4g} or more in {SPIKE_ROWS} logged steps, and was at most "
        f"{max(before):.4g} in the {SPIKE_HISTORY} before: training has become unstable, and may end with a lower "
        "accuracy although the loss falls again; a smaller optim.base_lr, a longer schedule.warmup_epochs or "
        "optim.clip_grad_norm helps, from an earlier checkpoint or anew"
    )


def strange_gradients(rows: Sequence[Row], course: Course) -> str | None:
    """Return what is wrong when the gradients are many times as large as before."""
    norms = [row["train/grad_norm"] for row in rows[-NORM_HISTORY[1] - NORM_ROWS :]]
    norms = [norm for norm in norms if math.isfinite(norm)]
    before, newest = norms[:-NORM_ROWS], norms[-NORM_ROWS:]
    if len(before) < NORM_HISTORY[0] or min(newest) <= NORM_FACTOR * (usual := statistics.median(before)):
        return None
    return (
        f"train/grad_norm is {min(newest):.3g} or more in {NORM_ROWS} logged steps, {min(newest) / usual:.0f} times "
        "its median before; optim.clip_grad_norm or a smaller optim.base_lr keeps such steps from doing harm"
    )


def data_wait(rows: Sequence[Row], course: Course) -> str | None:
    """Return what is wrong when steps wait for images."""
    newest = rows[-WAIT_ROWS:]
    if len(newest) < WAIT_ROWS or newest[-1]["step"] - newest[0]["step"] < WAIT_STEPS:
        return None
    share = statistics.median(row["perf/data_wait_s"] / row["perf/step_time_s"] for row in newest)
    if share <= WAIT_SHARE:
        return None
    return (
        f"{share:.0%} of each step is spent waiting for images (perf/data_wait_s); more data.threads, data.cache on "
        "the node's own disk, or shards by `mae-scale data pack` help"
    )


CHECKS: dict[str, Callable[[Sequence[Row], Course], str | None]] = {
    "untrained_loss": untrained_loss,
    "rising_loss": rising_loss,
    "loss_spike": loss_spike,
    "strange_gradients": strange_gradients,
    "data_wait": data_wait,
}


class SelfCheck:
    """The checks of a run, made by rank 0 at each logged step; the other ranks' does nothing."""

    def __init__(self, context: RunContext, tracker: Tracker, course: Course):
        self._events, self._tracker, self._course = context.events, tracker, course
        self._is_first = context.ranks.is_first
        self._rows: list[Row] = [*read_metrics(context.out / "metrics.jsonl")] if self._is_first else []
        said = {row["kind"]: row["reason"] for row in context.events.all("warning")}
        self._left = [kind for kind in CHECKS if kind not in said]
        for kind, text in said.items():  # MLflow may have been down when it was said
            tracker.tag(f"{TAG}{kind}", text)

    def see(self, row: Row) -> None:
        """Note a logged row; warn of what it shows, in the log, in events.jsonl and as a tag of the MLflow run."""
        if not self._is_first:
            return
        self._rows.append(row)
        for kind in list(self._left):
            text = CHECKS[kind](self._rows, self._course)
            if text is None:
                continue
            self._left.remove(kind)
            log.warning("%s", text)
            self._events.add("warning", row["step"], kind=kind, reason=text)
            self._tracker.tag(f"{TAG}{kind}", text)

    def rewind(self, step: int) -> None:
        """Forget the rows after a step."""
        self._rows = [row for row in self._rows if row["step"] <= step]


def _last(rows: Sequence[Row], steps: int, windows_ago: int = 0, *, after: int) -> list[float]:
    """Return the finite losses of the last `steps` steps, or of as many some windows of that length before them.

    None of them when they do not all lie after step `after`.
    """
    end = rows[-1]["step"] - windows_ago * steps
    if end - steps < after:
        return []
    losses: list[float] = []
    for row in reversed(rows):
        if row["step"] <= end - steps:
            break
        if row["step"] <= end and math.isfinite(row["train/loss"]):
            losses.append(row["train/loss"])
    return losses
