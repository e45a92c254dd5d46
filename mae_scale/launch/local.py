"""Several ranks on this machine without torchrun: started, sent what the launcher is sent, and never left behind.

torch's own agent kills its ranks 30 s after a SIGTERM, too soon for a checkpoint; it does not pass SIGUSR1 on, and
exit code 75 is a failure to it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from data_pipeline.errors import EXIT_DONE, EXIT_STOPPED, RunError
from mae_scale.distributed.stop_requests import LAUNCHER_VARIABLE, SIGNALS, insisted, passing_on, requested
from mae_scale.tracking.mlflow_uri import hide_password

GRACE_S = 15.0
"""What the others have, after one has failed, to say why they cannot go on (distributed.heartbeat: up to 12 s)."""
POLL_S = 0.1


def launch_local_ranks(
    nproc: int,
    arguments: list[str],
    program: tuple[str, ...] = ("-m", "mae_scale"),
    *,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> int:
    """Run `python PROGRAM ARGUMENTS` as nproc ranks, which must listen for stop requests first; return the exit code.

    0: all ended with 0. 75: the others with 75. Else the code of the first that failed. A stop request that this
    process has noted goes to every rank, which has all the time it needs to save; so does the end of a rank that was
    asked to stop itself. Noted before, none is started: 75. What the ranks print goes to `log`.
    A password in tracking.uri reaches them through the environment, so that `ps` does not show it.

    Raises RunError when a rank was killed by a signal, KeyboardInterrupt, all ranks killed, after a second Ctrl-C.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(passing_on())
        output = None if log is None else stack.enter_context(open(log, "w", encoding="utf-8"))
        # Bound but not listening: rank 0 can still listen at this port, and no one else is given it before that.
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        try:
            if requested():
                return EXIT_STOPPED
            arguments, secret = hide_password(arguments)
            variables = {**(environment or {}), **secret, "MASTER_PORT": str(held.getsockname()[1])}
            _start(ranks, nproc, [sys.executable, *program, *arguments], variables, output)
            return _outcome(*_wait(ranks))
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()


def _start(
    ranks: list[subprocess.Popen[bytes]],
    nproc: int,
    command: list[str],
    variables: dict[str, str],
    output: IO[str] | None,
) -> None:
    """Start nproc processes, each appended to `ranks` at once."""
    common = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        LAUNCHER_VARIABLE: str(os.getpid()),
        **variables,
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # otherwise a lost peer prints a C++ stack trace per rank
    }
    stderr = None if output is None else subprocess.STDOUT
    # A process starts with the signals blocked that its parent blocks. So a request, and a Ctrl-C in a terminal, which
    # reaches all of its processes, waits for the rank's listen().
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for rank in range(nproc):
            environment = {**defaults, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=stderr))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> tuple[dict[int, int], set[int]]:
    """Pass a request on until all have ended; exit codes in the order of ending, and the ranks that were given up."""
    codes: dict[int, int] = {}
    given_up: set[int] = set()
    passed_on = deadline = None
    while len(codes) < len(ranks):
        if insisted():
            raise KeyboardInterrupt
        # A rank that has stopped was asked by somebody else; the others may not know it.
        request = requested() or ("SIGTERM" if EXIT_STOPPED in codes.values() else None)
        if request is not None and passed_on is None:
            passed_on = signal.Signals[request]
            for process in ranks:
                process.send_signal(passed_on)
        for rank, process in enumerate(ranks):
            if rank in codes or process.poll() is None:
                continue
            # An interpreter that is ending no longer listens: it had done what the signal asks.
            stopped = passed_on is not None and process.returncode == -passed_on
            codes[rank] = EXIT_STOPPED if stopped else process.returncode
            if deadline is None and codes[rank] not in (EXIT_DONE, EXIT_STOPPED):
                deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            given_up |= set(range(len(ranks))) - codes.keys()
            for rank in given_up:
                ranks[rank].kill()
        time.sleep(POLL_S)
    return codes, given_up


def _outcome(codes: dict[int, int], given_up: set[int]) -> int:
    """Return the exit code of all. Raises RunError naming a rank that was killed."""
    failed = [(r, c) for r, c in codes.items() if r not in given_up and c not in (EXIT_DONE, EXIT_STOPPED)]
    if not failed:
        return max(codes.values())
    # A killed rank is why others failed, even if it was seen to end after them. An abort is not: libraries give up
    # in that way when they lose a peer.
    rank, code = min(failed, key=lambda item: item[1] > 0 or item[1] == -signal.SIGABRT)
    if code > 0:
        return code
    name = signal.Signals(-code).name
    raise RunError(
        f"rank {rank} was killed by {name}"
        + (" (out of memory?)" if name == "SIGKILL" else "")
        + "; the same command goes on from the last checkpoint"
    )
