"""The lock of a run's folder: one start at a time writes there.

DIR/run.lock says who holds it: host, process, Slurm job. Its owner touches it every BEAT_S. An owner on this machine is
looked up by its process; of one on another host the age of the last beat decides, by the clock of the file system. A
later start of the same Slurm job takes the lock from an earlier one at once: Slurm has given that one up. An owner that
finds the lock taken over leaves before it writes anything more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import EXIT_FAILED, UsageError
from data_pipeline.files import create_whole, write_atomically
from mae_scale.distributed.ranks import leave
from mae_scale.distributed.stop_requests import before_the_end

log = logging.getLogger("mae_scale")

NAME = "run.lock"
BEAT_S = 5.0
SILENT_S = 60.0
"""Age of the last beat at which an owner on another host counts as gone."""
LEAVING_S = 3 * BEAT_S
"""Time that an owner has to find its lock taken over and to leave."""
DYING_S = 3.0
"""Time that a process of this machine has to end, for one that was just killed."""
POLL_S = 0.1


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock, as it stands in the file."""

    host: str
    process: int
    process_started: int
    """In clock ticks since the machine was booted: tells a process from a later one with its number."""
    machine: str
    """Boot and process namespace, within which `process` means something."""
    slurm_job: str | None
    slurm_restart: int
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=platform.node(),
            process=os.getpid(),
            process_started=_started(os.getpid()) or 0,
            machine=_machine(),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            slurm_restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.process} on {self.host}{job}, since {self.since}"

    def succeeds(self, other: Owner) -> bool:
        """Return whether this is a later start of the same Slurm job."""
        same_job = self.slurm_job is not None and self.slurm_job == other.slurm_job
        return same_job and self.slurm_restart > other.slurm_restart

    def is_running(self) -> bool | None:
        """Return whether the process runs; None where that cannot be seen from here."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # of another user, whose processes may be hidden
            return None
        return _started(self.process) == self.process_started


class RunLock:
    """A held lock; made by hold()."""

    def __init__(self, path: Path, owner: Owner, *, made_folder: bool):
        self._path, self._owner, self._made_folder = path, owner, made_folder
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """End this process when another start has taken the lock over; to be called before something is written."""
        try:
            found = read_owner(self._path)
            if found is None:  # removed by hand
                _create(self._path, self._owner)
                return
        except (OSError, UsageError):  # a file system that fails for a while: the next look counts
            return
        if found.token != self._owner.token:
            print(
                f"error: {self._path.parent} was taken over by {found}; this start leaves and writes nothing more",
                file=sys.stderr,
                flush=True,
            )
            leave(EXIT_FAILED)

    def release(self) -> None:
        """Give the lock back, and remove the folder when this start made it and has left nothing there."""
        self._stop.set()
        self._heart.join()
        self.check()
        with contextlib.suppress(OSError):
            self._path.unlink()
            if self._made_folder:
                self._path.parent.rmdir()  # fails where something is in it

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.check()
            with contextlib.suppress(OSError):  # as in check()
                os.utime(self._path)


@contextlib.contextmanager
def hold(out: Path) -> Iterator[RunLock]:
    """Hold the lock of a run's folder, which is made if it is not there.

    Raises UsageError when another start holds it, or when the folder cannot be written to.
    """
    path, owner, made_folder = out / NAME, Owner.this_process(), not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        while not _create(path, owner):
            holder = read_owner(path)
            if holder is not None and _take_over(path, holder, owner):
                break
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written to: {error.strerror}") from None
    lock = RunLock(path, owner, made_folder=made_folder)
    with before_the_end(lock.release):
        try:
            yield lock
        finally:
            lock.release()


def refuse_held(out: Path) -> None:
    """Raise UsageError when a start holds the lock of a run's folder; takes up to SILENT_S to see that none does."""
    path = out / NAME
    holder = read_owner(path)
    if holder is not None:
        _wait_until_gone(path, holder)


def seems_held(out: Path) -> bool:
    """Return whether a start is at work in a run's folder; writes nothing there and does not wait.

    Of an owner on another host the age of its last beat decides, by this host's clock.
    """
    path = out / NAME
    try:
        holder = read_owner(path)
    except (OSError, UsageError):
        return False
    if holder is None:
        return False
    running = holder.is_running()
    return time.time() - _last_beat(path) <= SILENT_S if running is None else running


def read_owner(path: Path) -> Owner | None:
    """Return who holds the lock of that path; None when nobody does."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        raise UsageError(
            f"{path} is damaged, so it cannot be seen whether a run writes to {path.parent}; "
            "make sure that none does, and remove it"
        ) from None


def _create(path: Path, owner: Owner) -> bool:
    """Write the lock if it is not there; return False when it is."""
    return create_whole(path, _text(owner))


def _take_over(path: Path, holder: Owner, owner: Owner) -> bool:
    """Take the lock from a holder that is gone or succeeded; False when it must be looked at again."""
    at_work = False
    if owner.succeeds(holder):
        at_work = holder.is_running() is not False and _age(path) <= SILENT_S
    else:
        _wait_until_gone(path, holder)
    if read_owner(path) != holder:
        return False
    # Of two that take it over at once the last one has it, and the other finds that out.
    write_atomically(path, _text(owner))
    if at_work:
        log.warning("%s was held by an earlier start of this job (%s): waiting until it has left", path.parent, holder)
    deadline = time.monotonic() + LEAVING_S
    while at_work and holder.is_running() is not False and time.monotonic() < deadline:
        time.sleep(POLL_S)
    time.sleep(POLL_S)
    return read_owner(path) == owner


def _wait_until_gone(path: Path, holder: Owner) -> None:
    """Return once the holder is gone. Raises UsageError when it is at work."""
    beat, began, said = _last_beat(path), time.monotonic(), False
    while read_owner(path) == holder:
        running = holder.is_running()
        if running is False or (running is None and _age(path) > SILENT_S):
            return
        if (running and time.monotonic() - began > DYING_S) or _last_beat(path) != beat:
            raise UsageError(
                f"--out {path.parent} is in use by {holder}; wait until it has ended, or choose another --out"
            )
        if running is None and not said:
            said = True
            log.warning("%s is held by %s: waiting up to %.0f s for a sign of life", path.parent, holder, SILENT_S)
        time.sleep(POLL_S)


def _last_beat(path: Path) -> float:
    """Return when the lock was touched last, by the clock of its file system; 0 when it is not there."""
    try:
        with open(path, "rb") as file:  # opened: a network file system then asks its server
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _age(path: Path) -> float:
    """Return the seconds since the last beat, by the clock of the file system, which this host's may not agree with."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - _last_beat(path)
    finally:
        probe.unlink(missing_ok=True)


def _text(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), indent=1).encode() + b"\n"


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(process: int) -> int | None:
    """Return when a process of this machine was started, in clock ticks since its boot; None when it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
