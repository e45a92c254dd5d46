"""The points of slurm/scaling.sbatch as Slurm knows them: queued, running, cancelled, or why they failed.

Each job of the array leaves a record, DIR/slurm/ARRAY_NODES: empty from the start of the array's first job on, then
with the path of its log and its exit code. What is in the queue is asked of squeue, what has left it of sacct, where
there is one; before any job has started, an array is found by its command.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import RunError

RECORD = re.compile(r"(\d+)_(\d+)")
TIMEOUT_S = 30
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)


@dataclass(frozen=True)
class Record:
    """A job of an array, as its own file in DIR/slurm tells of it."""

    job: str
    """Such as 12_4."""
    log: Path | None
    """None before it has started."""
    code: str | None
    """Exit code; None before its end, or where it was killed."""

    @property
    def name(self) -> str:
        return name_of(self.job)


def name_of(job: str) -> str:
    """Return the name of the point that a job of an array measures, such as nodes_0004 of 12_4."""
    return f"nodes_{int(job.partition('_')[2]):04d}"


def submitted(folder: Path) -> dict[str, str]:
    """Return {name: state} of the points that were submitted to Slurm; of several submissions the last one counts."""
    records = sorted(_records(folder), key=_order)
    arrays = sorted({record.job.partition("_")[0] for record in records})
    answered, known = _of_slurm(arrays)
    known |= _by_command(folder)
    found = {record.job: _state(record, known.get(record.job), answered) for record in records}
    found |= {job: _word(state) for job, state in known.items() if job not in found}
    return {name_of(job): state for job, state in sorted(found.items(), key=lambda item: _numbers(item[0]))}


def jobs_in_queue() -> dict[str, str]:
    """Return {job id: state} of this user's jobs that wait or run. Raises RunError when squeue does not answer."""
    told = _ask(["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T %r"])
    if told is None:
        raise RunError("squeue does not answer, so it cannot be told which jobs are in the queue; is the cluster up?")
    return {job: _word(state.removesuffix(" None")) for job, _, state in (line.partition("|") for line in told)}


def _records(folder: Path) -> Iterator[Record]:
    for path in (folder / "slurm").glob("*_*"):
        if RECORD.fullmatch(path.name):
            log = code = None
            for line in path.read_text(encoding="utf-8").splitlines():
                what, _, value = line.partition(" ")
                if what == "log":
                    log, code = Path(value), None  # a requeued job starts again
                elif what == "ended":
                    code = value
            yield Record(path.name, log, code)


def _order(record: Record) -> tuple[int, ...]:
    return _numbers(record.job)


def _numbers(job: str) -> tuple[int, ...]:
    return tuple(map(int, job.split("_")))


def _state(record: Record, known: str | None, answered: bool) -> str:
    """Return the state of a job in words.

    known: its state in Slurm, with the reason of a wait; None where Slurm has forgotten it, or, unless `answered`,
    could not be asked.
    """
    if record.code is not None and (known is None or known.split()[0] in ("FAILED", "COMPLETED")):
        if record.code == "0":
            return "done, but its folder is gone"
        return f"failed: {_reason(record.log) or f'exit code {record.code}'}; see {record.log}"
    if known is not None:
        return _word(known)
    if record.log is None:
        return "cancelled before its start" if answered else "submitted, not started"
    return "killed" if answered else "running or killed"


def _word(known: str) -> str:
    """Return a state of Slurm's in our words."""
    state, _, reason = known.partition(" ")
    if state in WAITING:
        return f"queued ({reason})" if reason else "queued"
    if state not in ENDED:
        return "running"
    return "cancelled" if state == "CANCELLED" else f"failed: {state.lower().replace('_', ' ')}"


def _reason(log: Path | None) -> str | None:
    """Return the last error in a job's log, else its last line; None when it cannot be read."""
    if log is None:
        return None
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return None
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(reversed(errors or lines), None)


def _of_slurm(arrays: list[str]) -> tuple[bool, dict[str, str]]:
    """Return whether squeue has answered, and the state of each job of the arrays that Slurm still knows of."""
    if not arrays:
        return False, {}
    jobs = f"--jobs={','.join(arrays)}"
    accounted = _ask(["sacct", "--noheader", "--parsable2", "--allocations", "--array", jobs, "--format=JobID,State"])
    queue = _ask(["squeue", "--noheader", "--array", "--states=all", jobs, "--format=%i|%T %r"], none="Invalid job id")
    known = {}
    for line in [*(accounted or []), *(queue or [])]:
        job, _, state = line.partition("|")
        if RECORD.fullmatch(job):
            known[job] = state.removesuffix(" None")
    return queue is not None, known


def _by_command(folder: Path) -> dict[str, str]:
    """Return the state of the jobs of this user's arrays in the queue whose command has --out FOLDER."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T %r|%Z|%o"]
    found = {}
    for line in _ask(command) or []:
        job, state, place, words = (*line.split("|", 3), "", "", "")[:4]
        if RECORD.fullmatch(job) and _writes_to(folder, Path(place), words):
            found[job] = state.removesuffix(" None")
    return found


def _writes_to(folder: Path, place: Path, words: str) -> bool:
    """Return whether a command, its words joined by spaces, has --out FOLDER; it was called in `place`."""
    *_, after = re.split(r" --out[= ]", words)
    ends = [match.start() for match in re.finditer(r" |$", after)]
    return after != words and any((place / after[:end]).resolve() == folder.resolve() for end in ends)


def _ask(command: list[str], none: str | None = None) -> list[str] | None:
    """Return the lines of a command's output; None where it is missing or fails, unless its error has `none`."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if told.returncode:
        return [] if none is not None and none in told.stderr else None
    return told.stdout.splitlines()
