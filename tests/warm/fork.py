"""The zygote's side: wait for requests, fork, and let the fork be the command that was asked for."""

import contextlib
import ctypes
import multiprocessing.process
import os
import pickle
import runpy
import signal
import socket
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np

from tests.warm import LONGEST, NAME, ROOT, Request, Zygote, as_command

PR_SET_NAME = 15
PROJECT = ("mae_scale", "data_pipeline")
BASE_PATH = list(sys.path)


def serve(connection: socket.socket) -> Request:
    """Fork for each request; returns in the fork, with the request, as a process that is ready to run it."""
    _call_this_process(NAME)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
    while True:
        message, streams, *_ = socket.recv_fds(connection, LONGEST, 3)
        if not message:  # the caller has ended
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            os.close(told)
            return _in_between(connection, message, streams, tell)
        os.close(tell)
        os.waitpid(between, 0)  # from here on the fork is the caller's child
        pid = os.read(told, 64)
        for descriptor in (told, *streams):
            os.close(descriptor)
        connection.send(pid)


def _in_between(connection: socket.socket, message: bytes, streams: list[int], tell: int) -> Request:
    """Fork once more and end: so the fork gets another parent, the caller."""
    between, pid = os.getpid(), os.fork()
    if pid:
        os.write(tell, str(pid).encode())
        os._exit(0)
    os.close(tell)
    connection.close()
    while os.getppid() == between:
        time.sleep(0.0005)
    request = pickle.loads(message)
    if request.new_session:
        os.setsid()
    if "RANK" in request.environment:  # it starts none
        as_command(None)
    else:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            for descriptor in (*streams, mine.detach()):
                os.close(descriptor)
            return serve(its)
        its.close()
        as_command(Zygote(mine))
    _become(request, streams)
    return request


def _become(request: Request, streams: list[int]) -> None:
    """Give this process what a new interpreter would have."""
    for own, given in enumerate(streams):
        os.dup2(given, own)
    for given in streams:
        os.close(given)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    _show(request)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        old, by_line = getattr(sys, f"__{name}__"), number == 2 or os.isatty(number)
        new = open(number, "w", encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        new.reconfigure(line_buffering=by_line, write_through=unbuffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()
    np.random.seed()
    _call_this_process("python")
    signal.signal(signal.SIGINT, signal.SIG_IGN if request.ignores_ctrl_c else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)


def execute(argv: list[str]) -> None:
    """Run the program as `python ARGV` does."""
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    program, *rest = argv
    if program == "-m":
        sys.path[:] = [os.getcwd(), *given, *BASE_PATH[1:]]
        sys.argv[:] = rest
        _forget_the_project_of_another_copy()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif program == "-c":
        sys.path[:] = ["", *given, *BASE_PATH[1:]]
        sys.argv[:] = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[:] = [str(Path(program).resolve().parent), *given, *BASE_PATH[1:]]
        sys.argv[:] = argv
        runpy.run_path(program, run_name="__main__")


def _forget_the_project_of_another_copy() -> None:
    """Let the project's own modules be imported anew where another copy of it is the first to be found."""
    found = next((place for place in map(Path, sys.path) if (place / PROJECT[0]).is_dir()), ROOT)
    if found.resolve() != ROOT:
        for name in [name for name in sys.modules if name.partition(".")[0] in PROJECT]:
            del sys.modules[name]


def _call_this_process(name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def _show(request: Request) -> None:
    """Write the command and its environment where /proc/PID/cmdline and environ, and so `ps` and psutil, read them."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first, last, first_variable, last_variable = map(int, stat[45:49])
    variables = [f"{name}={value}" for name, value in request.environment.items()]
    variables.sort(key=lambda word: not word.startswith("RANK="))  # whatever else is cut off
    for words, start, end in ((request.argv, first, last), (variables, first_variable, last_variable)):
        text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
        with contextlib.suppress(ValueError):
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
