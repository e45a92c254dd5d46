"""The states of a scaling array's points, from the records in its folder and programs that answer as Slurm does."""

from pathlib import Path

import pytest

from mae_scale.launch.slurm_queue import submitted
from mae_scale.tasks.throughput_points import read_points


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Let squeue (of the jobs asked for, or of this user) and sacct answer with these lines; None: not there."""

    def answer(jobs: list[str] | None, mine: list[str] | None = None, accounted: list[str] | None = None) -> None:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        texts = {"squeue": (jobs, mine), "sacct": (accounted, accounted)}
        for name, (of_jobs, of_user) in texts.items():
            path = programs / name
            path.unlink(missing_ok=True)
            if of_jobs is None:
                continue
            one, other = ("\n".join(lines or []) for lines in (of_jobs, of_user))
            path.write_text(f'#!/bin/bash\ncase "$*" in *--jobs=*) echo "{one}" ;; *) echo "{other}" ;; esac\n')
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin" if jobs is not None else str(programs))

    answer(None)
    return answer


@pytest.fixture
def curve(tmp_path) -> Path:
    folder = tmp_path / "curve"
    (folder / "slurm").mkdir(parents=True)
    return folder


def record(curve: Path, job: str, *lines: str) -> None:
    """What a job of slurm/scaling.sbatch leaves."""
    (curve / "slurm" / job).write_text("".join(f"{line}\n" for line in lines))


def test_without_slurm_the_records_tell_what_they_can(curve, slurm):
    log = curve / "12_4.log"
    log.write_text("12: start 0\nerror: recipe demo: unknown key\n12: refused\n")
    record(curve, "12_1")
    record(curve, "12_2", f"log {curve}/12_2.log")
    record(curve, "12_4", f"log {log}", "ended 2")
    record(curve, "12_8", f"log {curve}/gone.log", "ended 1")
    record(curve, "12_16", f"log {log}", "ended 1", f"log {log}")  # requeued
    assert submitted(curve) == {
        "nodes_0001": "submitted, not started",
        "nodes_0002": "running or killed",
        "nodes_0004": f"failed: recipe demo: unknown key; see {log}",
        "nodes_0008": f"failed: exit code 1; see {curve}/gone.log",
        "nodes_0016": "running or killed",
    }


def test_the_queue_comes_before_the_records_and_accounting_knows_what_has_left_it(curve, slurm):
    for nodes in (1, 2, 4, 8, 16, 32):
        record(curve, f"12_{nodes}", *([f"log {curve}/x.log"] if nodes in (2, 8, 16) else []))
    slurm(
        ["12_1|PENDING Resources", "12_2|RUNNING None"],
        accounted=["12_2|PENDING", "12_4|CANCELLED by 1000", "12_8|TIMEOUT", "12_16|NODE_FAIL"],
    )
    assert submitted(curve) == {
        "nodes_0001": "queued (Resources)",
        "nodes_0002": "running",
        "nodes_0004": "cancelled",
        "nodes_0008": "failed: timeout",
        "nodes_0016": "failed: node fail",
        "nodes_0032": "cancelled before its start",
    }


def test_of_two_submissions_the_later_one_counts(curve, slurm):
    record(curve, "9_4", f"log {curve}/x.log", "ended 1")
    record(curve, "12_4")
    slurm(["12_4|PENDING Priority"])
    assert submitted(curve) == {"nodes_0004": "queued (Priority)"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("s.sbatch demo --out curve data.root=/d", True),
        ("s.sbatch demo --out=curve", True),
        ("s.sbatch demo --out other data.root=curve", False),
        ("s.sbatch demo --out curve --out other", False),
        ("s.sbatch curve", False),
    ],
)
def test_an_array_of_which_nothing_has_started_is_found_by_its_command(curve, slurm, words, found):
    slurm([], mine=[f"13_4|PENDING Resources|{curve.parent}|{words}", f"14|RUNNING None|{curve.parent}|{words}"])
    assert submitted(curve) == ({"nodes_0004": "queued (Resources)"} if found else {})


@pytest.mark.parametrize(
    ("events", "outside", "state"),
    [
        (["end"], "queued (Resources)", "done"),
        (["stop"], "queued (BeginTime)", "queued (BeginTime)"),
        (["stop"], "cancelled", "stopped (cancelled)"),
        (["failure"], "failed: exit code 1; see x.log", "failed: no memory"),
        ([], "failed: timeout", "failed: timeout"),
        ([], "running", "running"),
    ],
)
def test_what_a_run_says_of_itself_and_what_slurm_says_of_its_job(curve, events, outside, state):
    (curve / "nodes_0004").mkdir()
    rows = ['{"step": 0, "event": "start", "world_size": 8, "time": 0}']
    rows += [f'{{"step": 9, "event": "{event}", "reason": "no memory", "time": 1}}' for event in events]
    (curve / "nodes_0004" / "events.jsonl").write_text("\n".join(rows) + "\n")
    (point,) = read_points(curve, {"nodes_0004": outside})
    assert (point.state, point.ranks) == (state, 8)
