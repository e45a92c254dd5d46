"""One start at a time writes into a run's folder: a second is refused, one that was lost is followed or leaves."""

import json
import os
import signal
import threading
import time

import pytest

from tests.faults.harness import Training, newest_whole_step
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(300)

LOCK = "run.lock"


def command(digits, *more) -> list:
    many = [
        "schedule.epochs=1000",
        "schedule.stop_after_steps=60",
        "checkpoint.every_steps=5",
        "checkpoint.every_epochs=null",
    ]
    return ["pretrain", "demo", "--tracking-uri", "off", *arguments(digits), *many, *more]


def endless(digits, *more) -> list:
    return command(digits, "schedule.stop_after_steps=null", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits, mae_scale):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = mae_scale(*command(digits), "--out", out)
    assert done.returncode == 0, done.stderr
    assert not (out / LOCK).exists()
    return losses(out)


def elsewhere(out, *, seconds_ago: float) -> None:
    """A lock of a process on another host."""
    out.mkdir(exist_ok=True)
    owner = {"host": "node7", "process": 4242, "process_started": 17, "machine": "another boot pid:[1]"}
    owner |= {"slurm_job": "991", "slurm_restart": 0, "since": "2026-01-01 12:00:00", "token": "another"}
    (out / LOCK).write_text(json.dumps(owner))
    then = time.time() - seconds_ago
    os.utime(out / LOCK, (then, then))


def test_a_second_start_is_refused_and_named_and_the_first_goes_on(tmp_path, digits, mae_scale, whole):
    with Training(tmp_path / "run", *endless(digits), "--nproc", 2) as first:
        first.wait_until(lambda: newest_whole_step(first.out))
        holder = first.ranks()[0].pid
        for ranks in (1, 2):
            second = mae_scale(*endless(digits), "--nproc", ranks, "--out", first.out)
            assert second.returncode == 2
            assert second.stderr.count("\n") == 1
            assert f"--out {first.out} is in use by process {holder} on " in second.stderr
        pruned = mae_scale("checkpoints", "prune", first.out)
        assert pruned.returncode == 2
        assert f"in use by process {holder}" in pruned.stderr
        step = newest_whole_step(first.out)
        first.wait_until(lambda: newest_whole_step(first.out) > step)
        first.process.terminate()
        assert first.wait() == 75
    assert not (first.out / LOCK).exists()
    assert all(abs(loss - whole[step]) < 1e-6 for step, loss in losses(first.out).items() if step in whole)


def test_of_two_starts_at_once_one_trains(tmp_path, digits, whole):
    out = tmp_path / "run"
    with Training(out, *endless(digits)) as one, Training(out, *endless(digits), log="other") as other:
        deadline = time.monotonic() + 120
        while not (ended := [each for each in (one, other) if each.process.poll() is not None]):
            assert time.monotonic() < deadline, one.text() + other.text()
            time.sleep(0.05)
        trains = other if ended == [one] else one
        assert ended[0].process.returncode == 2, ended[0].text()
        trains.wait_until(lambda: len(losses(out)) >= 2)
        trains.process.terminate()
        assert trains.wait() == 75, trains.text()
    found = losses(out)
    assert all(found[step] == whole[step] for step in whole.keys() & found.keys())


def test_a_killed_owner_is_followed_at_once(tmp_path, digits, mae_scale, whole):
    with Training(tmp_path / "run", *endless(digits)) as first:
        first.wait_until(lambda: newest_whole_step(first.out))
        first.kill_all()
    assert (first.out / LOCK).exists()
    done = mae_scale(*command(digits), "--out", first.out)
    assert done.returncode == 0, done.stderr
    assert "is held by" not in done.stderr  # nothing was waited for
    found = losses(first.out)
    assert all(found[step] == whole[step] for step in whole)  # it may have been further than that


def test_an_owner_on_another_host_is_at_work_as_long_as_its_lock_is_touched(tmp_path, digits, mae_scale):
    out, ended = tmp_path / "run", threading.Event()
    elsewhere(out, seconds_ago=7)

    def beat() -> None:
        while not ended.wait(2):
            os.utime(out / LOCK)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        refused = mae_scale(*command(digits), "--out", out)
    finally:
        ended.set()
        heart.join()
    assert refused.returncode == 2
    assert f"--out {out} is in use by process 4242 on node7, Slurm job 991, since 2026" in refused.stderr
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_silent_owner_on_another_host_is_followed(tmp_path, digits, mae_scale, whole):
    elsewhere(tmp_path / "run", seconds_ago=55)  # the rest is waited for
    done = mae_scale(*command(digits), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "is held by process 4242 on node7, Slurm job 991" in done.stderr
    assert losses(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("suspended", [False, True], ids=["at work", "suspended"])
def test_a_lost_start_of_a_requeued_job_leaves_and_writes_nothing_beside_the_next(
    suspended, tmp_path, digits, mae_scale
):
    """As after a killed slurmd: the ranks of the lost node train on until Slurm takes the node for lost."""
    out, job = tmp_path / "run", {"SLURM_JOB_ID": "77"}
    with Training(out, *endless(digits), **job) as lost:
        lost.wait_until(lambda: newest_whole_step(out))
        if suspended:
            lost.process.send_signal(signal.SIGSTOP)
        with Training(out, *endless(digits), log="next", SLURM_RESTART_COUNT="1", **job) as following:
            following.wait_until(lambda: "going on from step" in following.text())
            step = newest_whole_step(out)
            if suspended:
                lost.process.send_signal(signal.SIGCONT)
            assert lost.wait(60) == 1
            following.wait_until(lambda: newest_whole_step(out) > step)
            following.process.terminate()
            assert following.wait() == 75
            assert f"{out} was taken over by process {following.process.pid} on " in lost.text()
            assert "Traceback" not in lost.text() + following.text()
    last = newest_whole_step(out)
    done = mae_scale(*command(digits, f"schedule.stop_after_steps={last}"), "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(tmp_path / "whole")
