"""Requests to stop: SIGTERM (a scheduler, the local launcher) and SIGUSR1 (Slurm's warning before the time limit).

A signal is only noted here; the loop looks at it once a step, saves and ends with exit code 75. Nothing heavy is
imported, so that a process can listen before it imports torch.
"""

import ctypes
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_VARIABLE = "MAE_SCALE_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1

_first: str | None = None


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 are requests; so is the death of the local launcher. Main thread only."""
    for signum in SIGNALS:
        signal.signal(signum, _note)
    # Removed: a process started by this one has another parent.
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    if launcher is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(launcher):  # it was already gone
            _note(signal.SIGTERM, None)
    # The launcher starts its ranks with both blocked, so that none is lost or kills before this moment.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def requested() -> str | None:
    """The name of the first signal that asked to stop, such as "SIGTERM"; None when there was none."""
    return _first


def _note(signum: int, _frame) -> None:
    global _first
    _first = _first or signal.Signals(signum).name
