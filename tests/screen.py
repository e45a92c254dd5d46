"""A terminal to run the command in: a pseudo-terminal, and what its screen shows while the command writes to it."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path

from tests import warm

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """Lines of so many columns that is never scrolled: text, carriage return, line feed, and what rich moves by."""

    def __init__(self, columns: int):
        self.columns = columns
        self.lines, self.row, self.column = [""], 0, 0
        self.wrapped: list[str] = []
        """Lines that a text was too long for."""

    def feed(self, text: str) -> None:
        """Show a whole number of escape sequences."""
        for number, command, control, plain in TOKEN.findall(text):
            if command == "A":
                self.row = max(0, self.row - int(number or 1))
            elif command == "K" and number == "2":
                self.lines[self.row] = ""
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self._next_line()
            elif plain:
                self._write(plain)
            else:
                assert command == "m" or number.startswith("?"), (number, command)

    def _write(self, text: str) -> None:
        for letter in text:
            if self.column == self.columns:
                self.wrapped.append(self.lines[self.row])
                self._next_line()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    def _next_line(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def in_terminal(arguments: list, columns: int, cwd: Path, timeout: float = 240) -> tuple[int, Screen, list[list[str]]]:
    """Run `mae-scale ARGUMENTS` on a terminal so wide: exit code, the screen at the end, and all its states."""
    inside, outside = pty.openpty()[::-1]
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_", "RANK", "COLUMNS", "LINES"))}
    command = [sys.executable, "-m", "mae_scale", *map(str, arguments)]
    process = warm.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env={**clean, "TERM": "xterm-256color"}, cwd=cwd
    )
    os.close(inside)
    screen, states, text, deadline = Screen(columns), [], "", time.monotonic() + timeout
    try:
        with contextlib.suppress(OSError):  # EIO: the last process has closed it
            while chunk := os.read(outside, 65536):
                assert time.monotonic() < deadline, screen.lines
                text += chunk.decode()
                # Up to the last line feed or carriage return: no sequence is cut there.
                whole = max(text.rfind("\n"), text.rfind("\r")) + 1
                screen.feed(text[:whole])
                text = text[whole:]
                states.append(list(screen.lines))
        screen.feed(text)
        return process.wait(deadline - time.monotonic()), screen, states
    finally:
        process.kill()
        os.close(outside)
