"""Requests to stop: SIGTERM (a scheduler, the local launcher), SIGUSR1 (Slurm's warning before the limit), Ctrl-C.

A process that listens ends at once, for it has nothing to save; one that heeds only notes the request and looks at it
once a step. A second Ctrl-C ends both at once. All this is a thread's, for the main thread may wait in a library for
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
"""A terminal's Ctrl-C reaches torchrun and its ranks, and torchrun hands it on: within so long it is the same one."""
INTERRUPTED = "interrupted; nothing is half-written, and the same command goes on or begins again"


@dataclass(frozen=True)
class _Heeding:
    """What is done where a request is only noted."""

    notice: str | None  # said at once, if anything
    ends: bool  # at a second Ctrl-C


_first: str | None = None
_insisted = False
_last_interrupt: float | None = None
_heeding: _Heeding | None = None
_last_acts: list[Callable[[], None]] = []
_alone = True  # no launcher that hands a Ctrl-C on
_has_launcher = False


def listen() -> None:
    """From now on SIGTERM, SIGUSR1 and Ctrl-C are requests; so is the death of the local launcher. Main thread only."""
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
    """From now on a request is only noted, and answered with the notice: requested() has it."""
    global _heeding
    _heeding = _Heeding(notice, ends=True)


@contextlib.contextmanager
def passing_on(notice: str | None = None) -> Iterator[None]:
    """A block that passes requests on to others, and ends them at once when insisted(). Inside another: that one's."""
    global _heeding
    before = _heeding
    _heeding = before or _Heeding(notice, ends=False)
    try:
        yield
    finally:
        _heeding = before


@contextlib.contextmanager
def before_the_end(act: Callable[[], None]) -> Iterator[None]:
    """A block in which act() is called before a request ends this process, for what may not be left behind."""
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
    """The thread: take each signal that has come, whatever the main thread is doing."""
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
    """Return whether this Ctrl-C is a later one. The local launcher's ranks are ended by it, and do not count."""
    global _last_interrupt
    before, _last_interrupt = _last_interrupt, time.monotonic()
    if before is None or _has_launcher:
        return False
    return _alone or _last_interrupt - before > HANDED_ON_S


def _say(text: str) -> None:
    """One line on stderr, of one process of the job; below the ^C of a terminal."""
    if this_rank().is_first:
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"{chr(10) if os.isatty(2) else ''}{text}\n".encode())
