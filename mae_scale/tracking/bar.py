"""The progress bar at the foot of a terminal, and lines above it that fit its width."""

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

MIN_BAR_COLUMNS = 5

Field = tuple[int, str]
"""Rank of a field of a line by importance, 0 first; and its text."""


def fitted(fields: Sequence[Field], columns: int) -> str:
    """Return the fields in their order, without the least important ones that do not fit into `columns` columns."""
    kept = sorted(fields)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > columns:
        kept.pop()
    return "  ".join(field[1] for field in fields if field in kept)


class Bar:
    """A bar that is redrawn below every printed line, and erased by stop()."""

    def __init__(self, total: int, done: int, fields: Sequence[Field], stream: TextIO | None):
        self._total, self._done, self._fields = total, done, fields
        self._screen = _Screen(file=stream or sys.stdout, force_terminal=True, highlight=False)
        self._live = Live(self, console=self._screen, transient=True)
        self._live.start()

    def update(self, done: int, fields: Sequence[Field]) -> None:
        """Show `done` of the total, and the fields that fit."""
        self._done, self._fields = done, fields

    def print_fitted(self, fields: Sequence[Field]) -> None:
        """Print one line above the bar, whatever the width."""
        self._screen.print(Text(fitted(fields, self._screen.width)), no_wrap=True, overflow="crop")

    def print(self, text: str, style: str | None = None) -> None:
        """Print a whole text above the bar; the terminal wraps long lines."""
        self._screen.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Erase the bar."""
        self._live.stop()

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        text = fitted(self._fields, options.max_width - MIN_BAR_COLUMNS - 1)
        columns = options.max_width - len(text) - 1
        if columns >= MIN_BAR_COLUMNS:
            yield ProgressBar(self._total, self._done, width=columns)
            text = f" {text}"
        yield Text(text, no_wrap=True, overflow="crop", end="")


class _Screen(Console):
    """A terminal whose cursor stays visible: a killed process could not restore it."""

    def show_cursor(self, show: bool = True) -> bool:
        return False
