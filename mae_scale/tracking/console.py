"""Rank 0's terminal: a live bar, or one plain line a logged step where there is no terminal (a Slurm log)."""

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

LOGGERS = ("mae_scale", "data_pipeline")
RECENT_UPDATES = 20  # the time left is told from the rate over so many logged steps


class NullConsole:
    """What the other ranks have: the same methods, and no output."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass


class Console(NullConsole):
    """The progress of a run, as a context manager; it also shows what the package logs while it is open."""

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: int | None = None,
        first_step: int = 0,
        label: str = "train",
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`first_step`: the step that a resumed run goes on after. `stream`: standard output if None.

        `live`: a bar (True) or plain lines (False); by default whether `stream` is a terminal. `clock`: in
        seconds.
        """
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.label = label
        self._stream = stream or sys.stdout
        is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live = is_terminal if live is None else live
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque([(clock(), first_step)], maxlen=RECENT_UPDATES + 1)
        self._first_step = first_step
        self._progress = self._task = None
        self._handler = _Handler(self)
        self._loggers_before: list[tuple[logging.Logger, int, bool]] = []

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a logged step: train/loss, train/lr, perf/images_per_second; epoch from them or the step."""
        self._recent.append((self._clock(), step))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status="  ".join(self._fields(step, metrics)))
        else:
            width = len(str(self.total_steps))
            fields = (f"{self.label} {step:>{width}}/{self.total_steps}", *self._fields(step, metrics))
            self._print("  ".join(fields))

    def rewind(self, step: int) -> None:
        """Go on after an earlier step; the time left is told anew."""
        self._recent.clear()
        self._recent.append((self._clock(), step))

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._print(text)

    def warning(self, text: str) -> None:
        """The same, marked as a warning."""
        self._print(f"warning: {text}", style="yellow")

    def time_left_s(self) -> float | None:
        """Seconds to the last step at the recent rate; None before there is one."""
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * max(self.total_steps - last_step, 0)

    def __enter__(self):
        if self._live:
            self._start_bar()
        for name in LOGGERS:
            logger = logging.getLogger(name)
            self._loggers_before.append((logger, logger.level, logger.propagate))
            logger.addHandler(self._handler)
            logger.propagate = False
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *exception) -> None:
        while self._loggers_before:
            logger, level, propagate = self._loggers_before.pop()
            logger.removeHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = propagate
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        def text(template: str) -> TextColumn:
            return TextColumn(template, markup=False, table_column=Column(no_wrap=True))

        self._progress = Progress(
            text("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            text("{task.fields[status]}"),
            console=RichConsole(file=self._stream, force_terminal=True, highlight=False),
            expand=True,
        )
        self._task = self._progress.add_task(
            self.label, total=self.total_steps, completed=self._first_step, status="starting"
        )
        self._progress.start()

    def _fields(self, step: int, metrics: Mapping[str, float]) -> tuple[str, ...]:
        """Fixed widths: a column stays where it is from line to line."""
        epoch = metrics.get("epoch", step / self.steps_per_epoch if self.steps_per_epoch else math.nan)
        left = self.time_left_s()
        rate = metrics.get("perf/images_per_second", math.nan)
        if self._live:
            parts = (
                f"epoch {epoch:.1f}",
                f"loss {metrics.get('train/loss', math.nan):.4f}",
                f"{rate:.0f} images/s",
                f"{duration(left)} left",
            )
            return tuple(part for part in parts if "nan" not in part or part.startswith("loss"))
        return (
            f"epoch {epoch:8.2f}",
            f"loss {metrics.get('train/loss', math.nan):8.4f}",
            f"lr {metrics.get('train/lr', math.nan):9.2e}",
            f"{rate:8.1f} images/s",
            f"{duration(left):>12} left",
            *([f"val top-1 {metrics['val/top1']:6.2f} %"] if "val/top1" in metrics else []),
        )

    def _print(self, text: str, style: str | None = None) -> None:
        if self._progress is not None:
            self._progress.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()


class _Handler(logging.Handler):
    """Python's logging, shown on a console."""

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


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, with days in front; dashes when not known."""
    if seconds is None:
        return "--:--:--"
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour:02}:{minute:02}:{second:02}"
