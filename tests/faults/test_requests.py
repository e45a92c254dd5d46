"""Requests to stop, through every command that starts ranks: Ctrl-C as a terminal sends it, SIGTERM, a parent lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mae_scale.distributed.stop_requests import INTERRUPTED
from mae_scale.tracking.metrics_log import read_metrics
from tests import warm
from tests.faults.harness import Command, Training, newest_whole_step
from tests.signals import listens
from tests.tiny import TINY, arguments, losses

SLOW = ["engine.micro_batch=5", "schedule.epochs=1000", "checkpoint.every_epochs=1000"]  # a tenth of a second a step
NOTICE = "SIGINT: this step is ended and a checkpoint written; Ctrl-C again ends at once\n"
NOTHING_SAVED = "stopped by {}; there was nothing to save, and the same command begins again or goes on\n"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mae_scale")


def command(digits: Path, *more: object) -> list:
    return ["pretrain", "demo", "--tracking-uri", "off", *arguments(digits), *SLOW, *more]


def steps_done(out: Path) -> int:
    rows = read_metrics(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def wait_for_listeners(running: Command, ranks: int) -> dict[int, psutil.Process]:
    """The ranks, once each is ready for a request."""

    def ready() -> dict[int, psutil.Process] | None:
        found = running.ranks()
        return found if len(found) == ranks and all(listens(rank.pid) for rank in found.values()) else None

    return running.wait_until(ready)


def assert_nothing_is_left(running: Command, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while running.left_behind():
        assert time.monotonic() < deadline, running.text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on_as_if_it_had_not_been(nproc, tmp_path, digits):
    out, whole = tmp_path / "run", tmp_path / "whole"
    start = command(digits, "--nproc", nproc)
    with Training(out, *start) as training:
        training.wait_until(lambda: steps_done(out) >= 3)
        training.ctrl_c()
        after = steps_done(out)
        assert training.wait(60) == 75, training.text()
        assert training.left_behind() == []
    last = steps_done(out)
    assert 3 <= last <= after + 2
    assert newest_whole_step(out) == last
    assert training.text().count(NOTICE) == 1
    assert training.text().endswith("stopped by SIGINT; the same command goes on from the last checkpoint\n")
    assert "Traceback" not in training.text()
    if nproc == 1:  # going on is the same for both
        return
    for folder in (out, whole):
        with Training(folder, *start, f"schedule.stop_after_steps={last + 6}") as training:
            assert training.wait() == 0, training.text()
    assert f"going on from step {last}\n" in (tmp_path / "run.log").read_text()
    assert losses(out) == losses(whole)
    assert len(losses(out)) == last + 6


@pytest.mark.slow
def test_ctrl_c_under_torchrun_writes_a_checkpoint_too(tmp_path, digits):
    """Its agent hands on to the ranks what they have had from the terminal already."""
    out = tmp_path / "run"
    with Training(out, *command(digits), program=TORCHRUN, cold=True, GLOO_SOCKET_IFNAME="lo") as training:
        training.wait_until(lambda: steps_done(out) >= 3)
        training.ctrl_c()
        training.wait(60)  # its agent says with 1 what the ranks say with 75
        assert_nothing_is_left(training)
    assert newest_whole_step(out) == steps_done(out) >= 3
    assert training.text().count(NOTICE) == 1
    assert "stopped by SIGINT; the same command goes on from the last checkpoint\n" in training.text()


def test_a_second_ctrl_c_ends_at_once_even_when_a_rank_hangs(tmp_path, digits):
    out = tmp_path / "run"
    with Training(out, *command(digits, "--nproc", 2)) as training:
        training.wait_until(lambda: steps_done(out) >= 3)
        training.ranks()[1].suspend()
        training.ctrl_c()
        training.wait_until(lambda: NOTICE in training.text())
        time.sleep(1)  # two at the same instant are one signal to a process that has not run in between
        assert training.process.poll() is None
        training.ctrl_c()
        assert training.wait(20) == 130, training.text()
        assert training.left_behind() == []
    assert training.text().endswith(f"{INTERRUPTED}\n")
    assert "Traceback" not in training.text()


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_while_a_run_starts_ends_it_soon_and_leaves_nothing_half_written(nproc, tmp_path, digits):
    """Within the imports of the ranks, or of the only process."""
    out = tmp_path / "run"
    with Training(out, *command(digits, "--nproc", nproc), cold=True) as training:
        if nproc == 2:
            wait_for_listeners(training, 2)
        else:
            training.wait_until(lambda: listens(training.process.pid))
        training.ctrl_c()
        assert training.wait(30) == 75, training.text()
        assert training.left_behind() == []
    assert training.text() == NOTHING_SAVED.format("SIGINT")
    assert not out.exists() or not any(out.rglob(".*"))


def test_a_request_to_one_rank_before_the_first_step_ends_all_of_them_together(tmp_path, digits):
    out = tmp_path / "run"
    with Training(out, *command(digits, "--nproc", 2)) as training:
        training.wait_until(lambda: "rank(s) on" in training.text(), pause_s=0)
        training.ranks()[1].send_signal(signal.SIGTERM)
        after = steps_done(out)  # 0, unless this process was slow to send it
        assert training.wait(60) == 75, training.text()
    done = steps_done(out)
    assert newest_whole_step(out) == done <= after + 2
    again = "goes on from the last checkpoint" if done else "begins again"
    assert training.text().endswith(f"stopped by a signal to another rank; the same command {again}\n")


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory) -> Path:
    """A classifier after one step."""
    out = tmp_path_factory.mktemp("weights") / "run"
    quick = ["schedule.stop_after_steps=1", "data.labels_per_class=null"]
    with Training(
        out, "finetune", "scratch/demo", "--tracking-uri", "off", *measured(digits, digits / "val"), *quick
    ) as training:
        assert training.wait() == 0, training.text()
    return out


def measured(digits: Path, val_root: Path) -> list[str]:
    model = [change for change in TINY if change.startswith("model.") and "decoder" not in change]
    return [f"data.root={digits}/train", f"data.val_root={val_root}", *model, "data.global_batch=120"]


@pytest.fixture(scope="module")
def many(digits, tmp_path_factory) -> Path:
    """Each validation image 120 times: to measure them all takes several seconds."""
    folder = tmp_path_factory.mktemp("many")
    for image in (digits / "val").glob("*/*.jpg"):
        (folder / image.parent.name).mkdir(exist_ok=True)
        for number in range(120):
            os.link(image, folder / image.parent.name / f"{number}_{image.name}")
    return folder


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("evaluate", "ctrl-c"), ("evaluate", "SIGUSR1 to a rank")),
        *(("evaluate", "parent killed"), ("knn", "SIGTERM")),
    ],
)
def test_what_measures_ends_at_a_request_and_with_its_parent_too(name, how, tmp_path, digits, many, weights):
    recipe = [name, "finetune/demo", "--weights", weights, "--nproc", 2, "--json", tmp_path / "x.json"]
    with Command(tmp_path / "log", *recipe, *measured(digits, many), cold=how == "parent killed") as measuring:
        ranks = wait_for_listeners(measuring, 2)
        if how == "parent killed":
            measuring.process.kill()
        elif how == "ctrl-c":
            measuring.ctrl_c()
        elif how == "SIGTERM":
            measuring.process.send_signal(signal.SIGTERM)
        else:
            ranks[1].send_signal(signal.SIGUSR1)
        assert measuring.wait(30) == (-signal.SIGKILL if how == "parent killed" else 75), measuring.text()
        assert_nothing_is_left(measuring)
    assert measuring.text() == NOTHING_SAVED.format("SIGINT" if how == "ctrl-c" else "SIGTERM")
    assert not (tmp_path / "x.json").exists()


def test_ctrl_c_ends_a_demo_and_its_training_with_a_checkpoint(tmp_path):
    """The one that starts its commands from threads."""
    out = tmp_path / "demo"
    with Training(out, "demo", "--transfer", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db") as demo:
        run = out / "run-seed0"
        demo.wait_until(lambda: (run / "metrics.jsonl").exists() and steps_done(run) >= 1)
        demo.ctrl_c()
        assert demo.wait(60) == 75, demo.text()
        assert_nothing_is_left(demo)
    assert newest_whole_step(run) > 0
    assert demo.text().endswith("the same command goes on; Ctrl-C again ends at once\n")
    assert "Traceback" not in demo.text() + (out / "transfer" / "run-seed0.log").read_text()


@pytest.mark.parametrize("verb", ["index", "verify --deep"])
def test_ctrl_c_ends_the_workers_of_a_data_command_with_one_line(verb, tmp_path, digits):
    root = tmp_path / "images"
    for copy in range(8):
        for file in (digits / "train").glob("*/*.jpg"):
            target = root / file.parent.name / f"{copy}_{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    with Command(tmp_path / "log", "data", *verb.split(), root, cold=True) as running:
        running.wait_until(lambda: len(psutil.Process(running.process.pid).children()) >= 2, pause_s=0)
        running.ctrl_c()
        assert running.wait(30) == 130, running.text()
        assert_nothing_is_left(running)
    assert running.text() == f"{INTERRUPTED}\n"
    assert [path.name for path in root.iterdir() if not path.is_dir()] in ([], [".mae_scale_index.npz"])


def as_srun_starts_them(
    ranks: int, per_node: int, *arguments: object, cold: bool = False, **environment: str
) -> list[tuple[int, str]]:
    """Exit codes and all output of `srun mae-scale ARGUMENTS`, where nothing ends the others when one fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_", "RANK", "MASTER_"))}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(ranks), **environment}
    processes = []
    for rank in range(ranks):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node)}
        processes.append(
            warm.Popen(
                [sys.executable, "-m", "mae_scale", *map(str, arguments)],
                env={**clean, **slurm, **place, "COLUMNS": "200"},
                cold=cold,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["data.roott=x"], "error: recipe demo: unknown key 'data.roott'; did you mean 'data.root'?\n"),
        (["data.root=x", "--no-such-option"], "No such option: --no-such-option"),
        pytest.param(["data.root=x"], "error: srun started this rank without MASTER_ADDR", marks=pytest.mark.slow),
    ],
)
def test_an_error_under_srun_is_said_once(wrong, said, tmp_path):
    command, is_deep = ["pretrain", "demo", "--out", tmp_path / "x", *wrong], wrong == ["data.root=x"]
    (code, first), (other_code, other) = as_srun_starts_them(2, 2, *command, cold=is_deep)
    assert (code, other_code) == (2, 2)
    assert said in first
    assert other == ""


def test_what_another_node_lacks_is_said_there_where_no_launcher_has_ended_it(tmp_path):
    """Rank 1 is the first of its node, and cannot know that rank 0 has found the same."""
    wrong = ["pretrain", "demo", "--out", tmp_path / "x", "data.root=x", "engine.config=/not/there.json"]
    (_, first), (_, other) = as_srun_starts_them(2, 1, *wrong, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert first.startswith("error: engine.config=/not/there.json cannot be read")
    assert other == f"error: rank 1: {first.removeprefix('error: ')}"
