"""A real Slurm of two nodes on this machine, for as long as the tests here run: up.sh starts it, down.sh ends it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mae_scale.tracking.metrics_log import read_metrics

HERE = Path(__file__).parent
TEMPLATES = HERE.parents[1] / "slurm"
CANNOT = 77  # up.sh's exit code where a machine cannot have a Slurm


class Cluster:
    """The cluster's commands, as a user of it calls them."""

    def __init__(self, state: Path, port: int):
        mine = ("SLURM", "SBATCH_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "MLFLOW_", "MAE_SCALE_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
        self.state, self.log = state, state / "log"
        self.environment = {
            **clean,
            "SLURMCI_STATE": str(state),
            "SLURMCI_PORT_BASE": str(port),
            "SLURMCI_SLURMD_TIMEOUT": "10",
            "SLURM_CONF": str(state / "slurm.conf"),
            "VIRTUAL_ENV": sys.prefix,
            "MAE_SCALE_INTERFACE": "lo",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }

    def call(self, *command, check: bool = True, cwd: Path | None = None, **environment: str):
        """Run a command; the finished process. Its output is the message when it fails and may not."""
        done = subprocess.run(
            [*map(str, command)],
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def up(self) -> None:
        """Start what does not run; skips the tests where there can be no cluster."""
        # Not through a pipe: the daemons would keep it open.
        with open(self.state / "up.log", "w+") as log:
            code = subprocess.run(
                [HERE / "up.sh"], env=self.environment, stdout=log, stderr=log, timeout=300, check=False
            ).returncode
            log.seek(0)
            said = log.read().strip()
        if code == CANNOT:
            pytest.skip(f"no Slurm here: {said.splitlines()[-1].removeprefix('up: ')}")
        assert code == 0, said

    def down(self) -> None:
        """End every process of the cluster and forget it."""
        subprocess.run([HERE / "down.sh"], env=self.environment, timeout=120, check=True, stdout=subprocess.DEVNULL)

    def sbatch(self, *arguments, cwd: Path, **environment: str) -> str:
        """Send a job of two ranks a node without GPUs, its log in cwd/JOB.log; the job's id."""
        shape = ["--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=15", "--output=%j.log"]
        return self.call("sbatch", "--parsable", *shape, *arguments, cwd=cwd, **environment).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts and ExitCode."""
        said = self.call("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, job: str, what: str, reached: Callable[[dict[str, str]], bool], log: Path, timeout_s: float) -> dict:
        """Wait until the job has come to what is wanted; fails with its log when it ends otherwise or is late."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.job(job)
            if reached(state):
                return state
            ended = state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            if ended or time.monotonic() > deadline:
                said = log.read_text() if log.exists() else "no log"
                pytest.fail(f"job {job} is {state['JobState']} and not {what}:\n{said}", pytrace=False)
            time.sleep(0.3)

    def wait_for_end(self, job: str, log: Path, *, state: str = "COMPLETED", timeout_s: float = 180) -> dict:
        """Wait until the job has ended in a state."""
        return self.wait(job, state, lambda found: found["JobState"] == state, log, timeout_s)

    def wait_for_step(self, job: str, out: Path, step: int, log: Path, *, timeout_s: float = 180) -> None:
        """Wait until the job has logged a step."""
        self.wait(job, f"at step {step}", lambda found: last_step(out) >= step, log, timeout_s)

    def wait_for_start(self, job: str, number: int, log: Path, *, timeout_s: float = 180) -> None:
        """Wait until the job runs its start number so many, from 0."""
        self.wait(
            job,
            f"in start {number}",
            lambda found: (found["JobState"], found["Restarts"]) == ("RUNNING", str(number)),
            log,
            timeout_s,
        )

    def wait_for_resumption(self, job: str, out: Path, step: int, log: Path) -> None:
        """Wait until the job's running start has written a checkpoint after that of a step."""
        self.wait(job, f"beyond step {step}", lambda found: manifest_steps(out)[-1] > step, log, 180)

    def rank(self, job: str, rank: int) -> psutil.Process:
        """The process of a job's rank."""
        for process in psutil.process_iter():
            try:
                environment, command = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            mine = (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")) == (job, str(rank))
            trains = not {"pretrain", "finetune"}.isdisjoint(command)
            if mine and "SLURM_STEP_ID" in environment and trains and "python" in command[0]:
                return process
        pytest.fail(f"job {job} has no rank {rank}")

    def kill_slurmd(self, node: str) -> None:
        """As if the node had lost its power: nobody is told."""
        os.kill(int((self.state / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)


def last_step(out: Path) -> int:
    """The last step in a run's metrics, 0 before the first."""
    return max(losses(out), default=0)


def losses(out: Path) -> dict[int, float]:
    """{step: training loss} of a run; a step that was logged twice fails."""
    path = out / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    found = {row["step"]: row["train/loss"] for row in rows}
    assert len(found) == len(rows), f"{path} has a step twice"
    return found


@pytest.fixture(scope="session")
def cluster():
    """Two nodes (node1, node2) and sixteen on paper, of 8 GPUs each, in partition `big`."""
    # Not below pytest's own folder: the user munge has to get there.
    state = Path(tempfile.mkdtemp(prefix="mae-scale-slurm-"))
    state.chmod(0o755)
    started = Cluster(state, free_ports())
    try:
        started.up()
        yield started
    finally:
        started.down()
        shutil.rmtree(state)


def free_ports() -> int:
    """The first of a block of ports for slurmctld and two slurmd (up.sh: base, base + 11, base + 12)."""
    for base in range(16817, 19000, 20):
        taken = []
        for port in (base, base + 11, base + 12):
            with socket.socket() as s:
                taken.append(s.connect_ex(("127.0.0.1", port)) == 0)
        if not any(taken):
            return base
    raise RuntimeError("no free ports between 16817 and 19000")


def manifest_steps(out: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(json.loads(m.read_text())["step"] for m in (out / "checkpoints").glob("step_*/manifest.json"))
