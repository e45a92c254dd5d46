"""Signals to other processes."""

import os
import signal
import time
from pathlib import Path


def send(pid: int, signum: signal.Signals, within_s: float = 20) -> None:
    """Send a signal and wait until the process has taken it: before that, the same one again would be one with it."""
    os.kill(pid, signum)
    wait_until_taken(pid, signum, within_s)


def wait_until_taken(pid: int, signum: signal.Signals, within_s: float = 20) -> None:
    """Wait until a signal that a process was sent is no longer pending, or the process has ended."""
    deadline = time.monotonic() + within_s
    while signum in _pending(pid):
        assert time.monotonic() < deadline, f"process {pid} has not taken {signum.name} within {within_s} s"
        time.sleep(0.01)


def _pending(pid: int) -> set[int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return set()
    mask = sum(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}
