"""Requests to stop: SIGTERM (a scheduler, the local launcher), SIGUSR1 (Slurm's warning before the limit), Ctrl-C.

A process that listens ends at once, for it has nothing to save; one that heeds only notes the request and reads it
once per step. A second Ctrl-C ends both at once. A thread does all this, for the main thread may wait in a library for
minutes. Nothing heavy is imported, so that a process can listen before it imports torch.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from data_pipeline.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from mae_scale.distributed.ranks import launched, leave, this_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER_VARIABLE = "MAE_SCALE_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1
HANDED_ON_S = 1.0
"""Time within which a Ctrl-C is the same one: a terminal sends it to torchrun and to its ranks, and torchrun too."""
INTERRUPTED = "interrupted; nothing is half-written, and the same command goes on or begins again"


@dataclass(frozen=True)
class _Heeding:
    """Reaction to a request that is only noted."""

    notice: str | None
    """Text printed at once."""
    ends: bool
    """True if a second Ctrl-C ends the process."""


_first: str | None = None
_insisted = False
_last_interrupt: float | None = None
_heeding: _Heeding | None = None
_last_acts: list[Callable[[], None]] = []
_alone = True  # no launcher that hands a Ctrl-C on
_has_launcher = False


def listen() -> None:
    """Take SIGTERM, SIGUSR1, Ctrl-C and the death of the local launcher as requests from now on; main thread only."""
    global _alone, _has_launcher
    _alone = not launched()  # asked now: a run of one is told it has rank 0
    received, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(received,), name="mae-scale-signals", daemon=True).start()
    for signum in SIGNALS:
        # Ctrl-C stays ignored in what a shell has put in the background.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)
    # Removed: a process started by this one has another parent.
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    _has_launcher = launcher is not None
    if launcher is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(launcher):  # it was already gone
            signal.raise_signal(signal.SIGTERM)
    # The launcher starts its ranks with all blocked, so that none is lost or kills before this moment.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def heed(notice: str | None = None) -> None:
    """Only note requests from now on, for requested(), and answer them with the notice."""
    global _heeding
    _heeding = _Heeding(notice, ends=True)


@contextlib.contextmanager
def passing_on(notice: str | None = None) -> Iterator[None]:
    """Only note requests in a block, which passes them on to other processes, and ends these at once when insisted().

    Where requests are only noted already, that stays as it is.
    """
    global _heeding
    before = _heeding
    _heeding = before or _Heeding(notice, ends=False)
    try:
        yield
    finally:
        _heeding = before


@contextlib.contextmanager
def before_the_end(act: Callable[[], None]) -> Iterator[None]:
    """Return a block in which act() is called before a request ends this process, to clean up."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


def requested() -> str | None:
    """Return the name of the first signal that asked to stop, such as "SIGTERM"; None when there was none."""
    return _first


def insisted() -> bool:
    """Return whether there was a second Ctrl-C."""
    return _insisted


def _watch(received: int) -> None:
    """Take each signal that arrives, in a thread, whatever the main thread is doing."""
    while True:
        for signum in os.read(received, 64):
            if signum in SIGNALS:
                _take(signal.Signals(signum))


def _take(signum: signal.Signals) -> None:
    global _first, _insisted
    interrupts = signum is signal.SIGINT and _last_interrupt is None
    is_news, _first = _first is None or interrupts, _first or signum.name
    if signum is signal.SIGINT and _is_another():
        _insisted = True
        if _heeding is None or _heeding.ends:
            _end(INTERRUPTED, EXIT_INTERRUPTED)
    elif _heeding is None:
        text = f"stopped by {signum.name}; there was nothing to save, and the same command begins again or goes on"
        _end(text, EXIT_STOPPED)
    elif _heeding.notice is not None and is_news:
        again = "; Ctrl-C again ends at once" if interrupts else ""
        _say(f"{signum.name}: {_heeding.notice}{again}")


def _end(text: str, code: int) -> NoReturn:
    _say(text)
    for act in list(_last_acts):
        act()
    leave(code)


def _is_another() -> bool:
    """Return whether this Ctrl-C is a later one; never in the local launcher's ranks, which the launcher ends."""
    global _last_interrupt
    before, _last_interrupt = _last_interrupt, time.monotonic()
    if before is None or _has_launcher:
        return False
    return _alone or _last_interrupt - before > HANDED_ON_S


def _say(text: str) -> None:
    """Print one line per job on stderr, below the ^C of a terminal."""
    if this_rank().is_first:
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"{chr(10) if os.isatty(2) else ''}{text}\n".encode())
