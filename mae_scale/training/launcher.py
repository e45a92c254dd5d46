"""Several ranks on this machine without torchrun: started, sent what the launcher is sent, and never left behind.

torch's own agent kills its ranks 30 s after a SIGTERM, too soon for a checkpoint; it does not pass SIGUSR1 on, and
exit code 75 is a failure to it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from mae_scale.errors import EXIT_DONE, EXIT_STOPPED, RunError
from mae_scale.tracking.uri import hide_password
from mae_scale.training.preemption import LAUNCHER_VARIABLE, SIGNALS, requested

GRACE_S = 15.0
"""What the others have, after one has failed, to say why they cannot go on (training.control: up to 12 s)."""
POLL_S = 0.1


def launch_local_ranks(
    nproc: int,
    arguments: list[str],
    program: tuple[str, ...] = ("-m", "mae_scale"),
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `python PROGRAM ARGUMENTS` as nproc ranks, which must call preemption.listen() first; their exit code.

    0: all ended with 0. 75: the others with 75. Else the code of the first that failed. SIGTERM and SIGUSR1 go to
    every rank, which has all the time it needs to save; noted before (preemption), none is started: 75. Ctrl-C kills
    the ranks. Main thread only. A password in tracking.uri reaches them by the environment: `ps` does not show it.

    Raises RunError when a rank was killed by a signal, KeyboardInterrupt after Ctrl-C.
    """
    received: list[int] = []
    before = {signum: signal.signal(signum, lambda signum, _: received.append(signum)) for signum in SIGNALS}
    ranks: list[subprocess.Popen] = []
    # Bound but not listening: rank 0 can still listen at this port, and no one else is given it before that.
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        try:
            if requested():
                return EXIT_STOPPED
            arguments, secret = hide_password(arguments)
            command = [sys.executable, *program, *arguments]
            _start(ranks, nproc, command, held.getsockname()[1], {**(environment or {}), **secret})
            return _outcome(*_wait(ranks, received))
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _start(ranks: list[subprocess.Popen], nproc: int, command: list[str], port: int, more: dict[str, str]) -> None:
    """Start nproc processes, each appended to `ranks` at once."""
    common = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost peer is otherwise a C++ stack trace a rank
    }
    # A process starts with the signals blocked that its parent blocks. So a request waits for the rank's listen(),
    # and Ctrl-C in a terminal, which reaches all of its processes, is the launcher's alone.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGINT})
    try:
        for rank in range(nproc):
            environment = {**defaults, **os.environ, **more, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(ranks: list[subprocess.Popen], received: list[int]) -> tuple[dict[int, int], set[int]]:
    """Pass signals on until all have ended; exit codes in the order of ending, and the ranks that were given up."""
    codes: dict[int, int] = {}
    given_up: set[int] = set()
    forwarded: set[int] = set()
    deadline = None
    while len(codes) < len(ranks):
        while received:
            forwarded.add(signum := received.pop(0))
            for process in ranks:
                process.send_signal(signum)
        for rank, process in enumerate(ranks):
            if rank in codes or process.poll() is None:
                continue
            # An interpreter that is ending no longer listens: it had done what the signal asks.
            codes[rank] = EXIT_STOPPED if -process.returncode in forwarded else process.returncode
            if deadline is None and codes[rank] not in (EXIT_DONE, EXIT_STOPPED):
                deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            given_up |= set(range(len(ranks))) - codes.keys()
            for rank in given_up:
                ranks[rank].kill()
        time.sleep(POLL_S)
    return codes, given_up


def _outcome(codes: dict[int, int], given_up: set[int]) -> int:
    """The exit code of all, or RunError naming the rank that was killed."""
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
