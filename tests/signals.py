"""What signals another process catches, and has still to take."""

import signal
import time
from pathlib import Path


def listens(pid: int) -> bool:
    """Return whether a process catches SIGTERM."""
    return _has(pid, "SigCgt", signal.SIGTERM)


def wait_until_taken(pid: int, signum: signal.Signals, within_s: float = 20) -> None:
    """Wait until a process has taken the signal that it was sent: before that, the same one again would be one with it.

    Returns also when the process has ended.
    """
    deadline = time.monotonic() + within_s
    while _has(pid, "ShdPnd", signum):
        assert time.monotonic() < deadline, f"process {pid} has not taken {signum.name} within {within_s} s"
        time.sleep(0.01)


def _has(pid: int, mask: str, signum: signal.Signals) -> bool:
    """Return whether a signal is in one of the masks of /proc/PID/status; False when there is no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    found = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith(f"{mask}:")), 0)
    return bool(found >> (signum - 1) & 1)
