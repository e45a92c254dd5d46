"""Python commands that start in a tenth of a second: real processes, forked from one that has imported everything.

A command costs 5 to 10 s of a core before its first line of work, nearly all of it imports. Here a zygote, started once
per test session, has done them, with one thread and nothing begun; each command is a fork of it with its own arguments,
environment, folder, streams and session. Its parent is who called Popen, as ever: pid, signals, exit code, /proc and
psutil are the real ones. A command has a zygote of its own from before its first line, for the ranks that it starts.

What differs from a cold start: the imports (order, time, what a module reads from the environment meanwhile), and one
seed of Python's hashes for all. Tests of promises about these say cold=True; whatever the zygote could not do in the
same way (another interpreter, options of Python, a GPU's driver, preexec_fn) is cold anyway.
"""

import atexit
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

NAME = "warm-zygote"
"""Of the processes here that are none of the commands', in /proc/PID/comm."""
ROOT = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36
LONGEST = 1 << 17
"""Bytes of a request; a socket's buffer holds it."""
ROOM = 1 << 16
"""Bytes at the zygote's start for what /proc/PID/cmdline and environ of its forks will show."""
PROGRAMS = ("-m", "-c")
READ_AT_START = "PYTHON", "LD_", "MALLOC_", "OMP_", "LC_", "LANG"
"""Variables that have had their effect when the zygote forks."""
NO_EFFECT = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER")  # these are done anew


@dataclass(frozen=True)
class Request:
    """A command to be forked; its stdin, stdout and stderr go with the message."""

    argv: list[str]
    environment: dict[str, str]
    cwd: str
    new_session: bool
    ignores_ctrl_c: bool
    blocked: list[int]


class Zygote:
    """The caller's end of a zygote."""

    def __init__(self, connection: socket.socket):
        self._connection, self._lock = connection, threading.Lock()

    def start(self, request: Request, streams: list[int]) -> int:
        """Return the pid of the new process, which is a child of this one."""
        message = pickle.dumps(request)
        assert len(message) < LONGEST, len(message)
        with self._lock:
            # For this moment an orphan below this process becomes its child: the fork, whose parent ends at once.
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._connection, [message], streams)
                answer = self._connection.recv(64)
            finally:
                ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
        if not answer:
            raise RuntimeError("the zygote of the tests has ended; what it said stands above")
        return int(answer)


_zygote: Zygote | None = None
_is_command = False


def as_command(zygote: Zygote | None) -> None:
    """Be a forked command: what it starts by subprocess is forked too, where it has a zygote."""
    global _zygote, _is_command
    _zygote, _is_command = zygote, True
    subprocess.Popen = Popen


class Popen(subprocess.Popen):
    """subprocess.Popen, warm where that makes no difference but time.

    minds_ctrl_c: undo what a shell does for a command in the background, such as the tests may be.
    """

    def __init__(self, args, *, cold: bool = False, minds_ctrl_c: bool = False, **options):
        self._cold, self._minds_ctrl_c = cold, minds_ctrl_c
        super().__init__(args, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, flags, *rest):
        shell, *pipes, _restore_signals = rest[:8]
        new_session = rest[12]
        environment = dict(os.environ if env is None else env)
        other = executable is not None or preexec_fn is not None or pass_fds or shell or not close_fds
        if self._cold or other or not _can_be_warm(args, environment):
            preexec_fn = _mind_ctrl_c if self._minds_ctrl_c else preexec_fn
            super()._execute_child(
                *(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, flags), *rest
            )
            return
        inside = pipes[0], pipes[3], pipes[5]
        request = Request(
            [os.fspath(word) for word in args],
            environment,
            os.fspath(cwd or os.getcwd()),
            new_session,
            signal.getsignal(signal.SIGINT) is signal.SIG_IGN and not self._minds_ctrl_c,
            [int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        )
        streams = [own if given == -1 else given for own, given in enumerate(inside)]
        self.pid = _the_zygote().start(request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run(args, *, cold: bool = False, timeout: float | None = None, **options) -> subprocess.CompletedProcess:
    """subprocess.run(capture_output=True, text=True), warm."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(args, cold=cold, **{**streams, **options}) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def _mind_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _can_be_warm(args, environment: dict[str, str]) -> bool:
    """Whether a fork of the zygote does what the command would."""
    if (_is_command and _zygote is None) or os.path.exists("/dev/nvidiactl"):
        return False
    if isinstance(args, (str, bytes)) or args[0] != sys.executable or len(args) < 2:
        return False
    if str(args[1]).startswith("-") and args[1] not in PROGRAMS:
        return False

    def at_start(variables) -> dict[str, str]:
        return {k: v for k, v in variables.items() if k.startswith(READ_AT_START) and k not in NO_EFFECT}

    return at_start(environment) == at_start(os.environ)


def _the_zygote() -> Zygote:
    """This session's, started at first use."""
    global _zygote
    if _zygote is None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.set_inheritable(its.fileno(), True)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(its.fileno()), "-" * ROOM],
            cwd=ROOT,
            env={**os.environ, "ROOM": "-" * ROOM},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
        )
        its.close()
        _zygote = Zygote(mine)
        atexit.register(process.wait)
        atexit.register(mine.close)  # the first to be called: the zygote ends
    return _zygote
