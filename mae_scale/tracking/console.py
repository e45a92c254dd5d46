"""Rank 0's terminal: a line per logged step, and below them a bar where there is a terminal (not in a Slurm log)."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mae_scale.human_units import duration
from mae_scale.tracking.output import LOGGERS, Output

if TYPE_CHECKING:
    from mae_scale.tracking.bar import Bar

RECENT_UPDATES = 20  # logged steps whose rate gives the ETA


class NullConsole:
    """Console of the other ranks: the same methods without output."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def rewind(self, step: int) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def warning(self, text: str) -> None:
        """Show nothing."""

    def conclude(self, text: str) -> None:
        """Show nothing."""

    def __enter__(self) -> NullConsole:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class Console(NullConsole):
    """Display of a run's progress, as a context manager; while it is open it also shows what the package logs.

    Everything but the bar is written to the output's log file too, shown or not.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: int | None = None,
        first_step: int = 0,
        label: str = "train",
        output: Output | None = None,
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`first_step`: the step after which a resumed run continues. `stream`: standard output if None.

        `live`: a bar below the lines (True) or lines only (False); by default whether `stream` is a terminal.
        `clock`: in seconds.
        """
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.label = label
        self._output = output or Output()
        self._stream = stream or sys.stdout
        is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live = (is_terminal if live is None else live) and not self._output.quiet
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque([(clock(), first_step)], maxlen=RECENT_UPDATES + 1)
        self._first_step = first_step
        self._bar: Bar | None = None
        self._handler = _Handler(self)
        self._loggers_before: list[tuple[logging.Logger, list[logging.Handler], int, bool]] = []

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a logged step: train/loss, train/lr, perf/images_per_second, and the epoch from them or the step."""
        self._recent.append((self._clock(), step))
        fields = self._fields(step, metrics)
        line = "  ".join(text for _, text in fields)
        self._output.log(line)
        if self._bar is not None:
            self._bar.update(step, self._bar_fields(step, metrics))
            self._bar.print_fitted(fields)
        elif not self._output.quiet:
            self._write(line)

    def rewind(self, step: int) -> None:
        """Continue after an earlier step; the ETA is measured anew."""
        self._recent.clear()
        self._recent.append((self._clock(), step))

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text)

    def warning(self, text: str) -> None:
        """Print a line above the bar, marked as a warning."""
        self._print(f"warning: {text}", style="yellow")

    def conclude(self, text: str) -> None:
        """Print the last line, on how the run ended; --quiet shows it too."""
        self._print(text, always=True)

    def time_left_s(self) -> float | None:
        """Return the seconds to the last step at the recent rate; None before there is one."""
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * max(self.total_steps - last_step, 0)

    def __enter__(self) -> Console:
        if self._live:
            from mae_scale.tracking.bar import Bar

            begun = [(0, f"{self.label} {self._first_step}/{self.total_steps}"), (1, "starting")]
            self._bar = Bar(self.total_steps, self._first_step, begun, self._stream)
        for name in LOGGERS:
            logger = logging.getLogger(name)
            self._loggers_before.append((logger, list(logger.handlers), logger.level, logger.propagate))
            logger.handlers[:] = [self._handler]
            logger.propagate = False
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._loggers_before:
            logger, handlers, level, propagate = self._loggers_before.pop()
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _fields(self, step: int, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """Return a line's fields, by importance, with fixed widths, so that columns align from line to line."""
        width = len(str(self.total_steps))
        return [
            (0, f"{self.label} {step:>{width}}/{self.total_steps}"),
            (5, f"epoch {self._epoch(step, metrics):8.2f}"),
            (1, f"loss {metrics.get('train/loss', math.nan):8.4f}"),
            (4, f"lr {metrics.get('train/lr', math.nan):9.2e}"),
            (3, f"{metrics.get('perf/images_per_second', math.nan):8.1f} images/s"),
            (6, f"{duration(self.time_left_s()):>12} left"),
            *_evaluation(metrics),
        ]

    def _bar_fields(self, step: int, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """Return the bar's fields, by importance."""
        return [
            (0, f"{self.label} {step}/{self.total_steps}"),
            (4, f"epoch {self._epoch(step, metrics):.1f}"),
            (1, f"loss {metrics.get('train/loss', math.nan):.4f}"),
            (3, f"{metrics.get('perf/images_per_second', math.nan):.0f} images/s"),
            (2, f"{duration(self.time_left_s())} left"),
        ]

    def _epoch(self, step: int, metrics: Mapping[str, float]) -> float:
        return metrics.get("epoch", step / self.steps_per_epoch if self.steps_per_epoch else math.nan)

    def _print(self, text: str, style: str | None = None, always: bool = False) -> None:
        self._output.log(text)
        if self._bar is not None:
            self._bar.print(text, style)
        elif always or not self._output.quiet:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


def _evaluation(metrics: Mapping[str, float]) -> list[tuple[int, str]]:
    """Return the fields of what was measured on the validation images, where it was."""
    if "val/top1" in metrics:
        return [(2, f"val top-1 {metrics['val/top1']:6.2f} %")]
    if "val/mean_iou" in metrics:
        return [(2, f"val mean IoU {metrics['val/mean_iou']:6.2f} %")]
    if "val/box_ap" in metrics:
        return [(2, f"val box AP {metrics['val/box_ap']:5.1f}  mask AP {metrics.get('val/mask_ap', math.nan):5.1f}")]
    loss, knn = metrics.get("val/loss"), metrics.get("val/knn_top1")
    fields = [] if loss is None else [(2, f"val loss {loss:.4f}")]
    return fields if knn is None else [*fields, (2, f"k-NN top-1 {knn:.2f} %")]


class _Handler(logging.Handler):
    """Handler of Python's logging that shows records on a console."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                self._console.warning(text)
            else:
                self._console.message(text)
        except Exception:
            self.handleError(record)
