"""A real training that is killed: started in a group of its own, its ranks found and killed at a chosen instant."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mae_scale.checkpoints.store import Damaged, list_checkpoints, verify
from tests import warm


class Command:
    """`mae-scale ARGUMENTS`, running, all it says in a file; a context manager that leaves no process behind.

    cold: it and its ranks import everything themselves, as they do for a user.
    """

    def __init__(
        self,
        log: Path,
        *arguments: object,
        program: tuple[str, ...] = ("-m", "mae_scale"),
        cold: bool = False,
        **environment: str,
    ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_", "RANK"))}
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log
        self._log = open(log, "wb")  # noqa: SIM115  (closed by __exit__)
        self.process = warm.Popen(
            [sys.executable, *program, *map(str, arguments)],
            env={**clean, "COLUMNS": "120", **environment},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            minds_ctrl_c=True,
            cold=cold,
        )

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that are ranks of this command, by rank; what these start (such as `uname -p`) is none."""
        found = {}
        for process in self._children():
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None:
                found.setdefault(int(rank), process)  # what it has started comes after it
        return found

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 120, pause_s: float = 0.002) -> object:
        """What the condition gives once that is true. Fails when the command has ended or the time is up."""
        deadline = time.monotonic() + timeout_s
        while not (answer := condition()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{self.text()}"
            time.sleep(pause_s)
        return answer

    def wait(self, timeout_s: float = 180) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended within {timeout_s} s:\n{self.text()}") from None

    def kill_all(self) -> None:
        """SIGKILL to the launcher and every rank, at once: a machine that loses its power."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ctrl_c(self) -> None:
        """SIGINT to the launcher and every rank, as a terminal sends it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def text(self) -> str:
        """What it has printed so far, stdout and stderr."""
        return self._log_path.read_text(errors="replace")

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def left_behind(self) -> list[int]:
        """Processes of the command's session that still live."""
        left = [pid for pid in psutil.pids() if _session(pid) == self.process.pid]
        return [pid for pid in left if _comm(pid) not in ("", warm.NAME) and psutil.Process(pid).status() != "zombie"]

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


class Training(Command):
    """`mae-scale ARGUMENTS --out OUT`, its log beside OUT, by its name where no other is given."""

    def __init__(self, out: Path, *arguments: object, log: str | None = None, **options):
        self.out = out
        super().__init__(out.parent / f"{log or out.name}.log", *arguments, "--out", out, **options)


def newest_whole_step(out: Path) -> int:
    """The step that a start must go on from: of the newest checkpoint that verifies; 0 without one."""
    for step, folder in reversed(list_checkpoints(out / "checkpoints")):
        try:
            verify(folder)
        except Damaged:
            continue
        return step
    return 0


def kill_after(out: Path, step: int, *arguments: object) -> None:
    """Start a training, and kill it whole as soon as a checkpoint of that step or a later one verifies."""
    with Training(out, *arguments) as training:
        training.wait_until(lambda: newest_whole_step(out) >= step)
        training.kill_all()


def is_saving(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((out / "checkpoints").glob(".step_*.partial/rank_*"))


def is_loading(rank: psutil.Process) -> bool:
    """Whether a rank has a checkpoint's shard open, to verify or to read it."""
    files = Path(f"/proc/{rank.pid}/fd")
    try:
        if any(os.readlink(file).endswith(".safetensors") for file in files.iterdir()):
            return True
        return ".safetensors" in Path(f"/proc/{rank.pid}/maps").read_text()
    except OSError:
        return False


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None
