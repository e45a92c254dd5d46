"""The output of a start: on the terminal (--quiet), and in a file that has all of it (--log-file)."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from data_pipeline.errors import RunError, UsageError
from mae_scale.distributed.ranks import this_rank

log = logging.getLogger("mae_scale")

LOGGERS = ("mae_scale", "data_pipeline")
ERASE_LINE = "\r\x1b[2K"


class Output:
    """Settings of --quiet and --log-file, as a context manager around a whole start.

    Inside it the package's warnings are shown even before and after a console is open, and an error that leaves it is
    in the log file too. Rank 0, and the launcher that started it, append to the file.
    """

    def __init__(self, quiet: bool = False, log_file: Path | None = None):
        self.quiet, self.log_file = quiet, log_file
        self._file: BinaryIO | None = None
        self._handler = _Warnings(self)

    def log(self, text: str) -> None:
        """Append to the log file, if there is one; warn once when the disk refuses, and write no more."""
        if self._file is None:
            return
        try:
            self._file.write(f"{text}\n".encode(errors="replace"))
        except OSError as error:
            self._file = None
            log.warning("--log-file %s cannot be written any more: %s", self.log_file, error.strerror)

    def __enter__(self) -> Output:
        """Open the log file; raise UsageError when it cannot be written."""
        if self.log_file is not None and this_rank().is_first:
            try:
                self._file = open(self.log_file, "ab", buffering=0)
            except OSError as error:
                raise UsageError(f"--log-file {self.log_file} cannot be written: {error.strerror}") from None
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (UsageError, RunError)):
            self.log(f"error: {error}")
        elif error is not None:
            self.log("".join(traceback.format_exception(error)).rstrip())
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        if self._file is not None:
            self._file.close()
            self._file = None


class _Warnings(logging.Handler):
    """Handler of what is logged while no console is open, and on the ranks that have none."""

    def __init__(self, output: Output):
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"warning: {self.format(record)}"
            self._output.log(text)
            if not self._output.quiet:
                # On a terminal another rank may be drawing its bar on this line; it redraws it on the next.
                print((ERASE_LINE if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
