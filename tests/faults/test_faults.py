"""What happens to real runs of two ranks: signals, killed and hanging ranks, damaged files, full disks, NaNs."""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from mae_scale.checkpoints.export import checkpoint_model, find_checkpoint
from mae_scale.checkpoints.shards import MOMENTUM
from mae_scale.checkpoints.store import list_checkpoints, verify
from mae_scale.tracking.metrics_log import read_metrics
from tests.faults.harness import Training, newest_whole_step
from tests.faults.test_moco_spike import TINY as MOCO
from tests.faults.torture import torture
from tests.tiny import STEPS, arguments, events, losses, stored

SLOW = ["engine.micro_batch=5", "schedule.epochs=1000"]  # twelve micro-batches a step: a tenth of a second


@pytest.fixture(scope="module")
def command(digits):
    """Arguments of a run of two ranks that says nothing to MLflow."""
    return ["pretrain", "demo", "--nproc", 2, "--tracking-uri", "off", *arguments(digits)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    """An uninterrupted run of 24 steps with a checkpoint every two, of which all stay; its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with Training(out, *command, "checkpoint.every_steps=2", "checkpoint.keep=20") as training:
        assert training.wait() == 0, training.text()
    return out


def steps_done(out: Path) -> int:
    rows = read_metrics(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


@pytest.mark.parametrize(
    ("signum", "to"),
    [
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, "launcher"),
        pytest.param(signal.SIGUSR1, "launcher", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_one_rank_stops_all_at_one_step_with_a_checkpoint_and_code_75(signum, to, tmp_path, digits):
    """Tracked in MLflow, which has each step once after all the starts."""
    out = tmp_path / "run"
    slow = ["pretrain", "demo", "--nproc", 2, *arguments(digits), *SLOW, "checkpoint.every_epochs=1000"]
    with Training(out, *slow) as training:
        training.wait_until(lambda: steps_done(out) >= 3)
        before = steps_done(out)
        if to == "launcher":
            training.process.send_signal(signum)
        else:
            training.ranks()[to].send_signal(signum)
        after = steps_done(out)
        assert training.wait(60) == 75, training.text()
        assert training.left_behind() == []
    last = steps_done(out)
    assert before <= last <= after + 2
    assert newest_whole_step(out) == last
    assert f"stopped by {signum.name}" in training.text() or "a signal to another rank" in training.text()
    assert [(event, step) for event, step, _ in events(out)] == [("start", 0), ("stop", last)]
    with Training(out, *slow, f"schedule.stop_after_steps={last + 2}") as training:
        assert training.wait() == 0, training.text()
    assert f"going on from step {last}\n" in training.text()
    rows = losses(out)
    assert list(rows) == list(range(1, last + 3))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    assert verify(list_checkpoints(out / "checkpoints")[-1][1])["mlflow_run_id"] == run_id
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == sorted(rows.items())


@pytest.mark.slow  # test_control.py names a stopped rank, test_launcher.py ends one
@pytest.mark.parametrize("saves", ["checkpoint.every_epochs=1000", "checkpoint.every_steps=1"])
def test_a_hanging_rank_is_named_within_the_timeout_and_nothing_is_left_behind(saves, tmp_path, command):
    """Also where the others may be waiting for it to end a save."""
    out = tmp_path / "run"
    with Training(out, *command, *SLOW, "engine.collective_timeout_s=5", saves) as training:
        training.wait_until(lambda: steps_done(out) >= 3)
        began = time.monotonic()
        training.ranks()[1].send_signal(signal.SIGSTOP)
        assert training.wait(60) == 1, training.text()
        assert time.monotonic() - began < 2 * 5 + 25  # the timeout; finding out who; the launcher's patience
        assert "error: rank 1 no longer answers" in training.text()
        assert "Traceback" not in training.text()
        assert training.left_behind() == []
    event, step, reason = events(out)[-1]
    assert (event, step) == ("failure", steps_done(out))
    assert reason.startswith("rank 1 no longer answers")


def test_a_killed_rank_is_named_and_ends_the_others_at_once(tmp_path, command):
    out = tmp_path / "run"
    with Training(out, *command, *SLOW) as training:
        training.wait_until(lambda: steps_done(out) >= 3)
        began = time.monotonic()
        training.ranks()[0].kill()
        assert training.wait(60) == 1, training.text()
        assert time.monotonic() - began < 25
        assert "error: rank 0 was killed by SIGKILL" in training.text()
        assert training.left_behind() == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {  # step: (what is done to the checkpoint, what is said of it)
    12: (lambda f: (f / "rank_00001.safetensors").unlink(), "rank_00001.safetensors is missing"),
    10: (lambda f: cut(f / "rank_00000.safetensors"), "rank_00000.safetensors has "),
    8: (lambda f: flip(f / "rank_00001.safetensors"), "rank_00001.safetensors is not what was written"),
    6: (lambda f: cut(f / "manifest.json"), "manifest.json cannot be read"),
    4: (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
}


def test_damaged_checkpoints_are_named_and_set_aside_and_the_one_before_is_used(tmp_path, command, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step, folder in list_checkpoints(out / "checkpoints"):
        if step > 12:
            shutil.rmtree(folder)
    for step, (damage, _) in DAMAGE.items():
        damage(out / "checkpoints" / f"step_{step:08d}")
    with Training(out, *command) as training:
        assert training.wait() == 0, training.text()
    for step, (_, said) in DAMAGE.items():
        assert f"checkpoint step_{step:08d} is damaged: {said}" in training.text()
        assert (out / "checkpoints" / f"damaged_step_{step:08d}").is_dir()
    assert "going on from step 2\n" in training.text()
    assert losses(out) == losses(whole)

    for _, folder in list_checkpoints(out / "checkpoints"):
        flip(folder / "rank_00000.safetensors")
    for _ in range(2):  # not at the second start either
        with Training(out, *command) as training:
            assert training.wait() == 1, training.text()
        assert training.text().count("error: none of the checkpoints in") == 1
        assert "Traceback" not in training.text()
    assert losses(out) == losses(whole)


def test_a_full_disk_costs_no_checkpoint_and_no_step_and_the_third_failure_ends_the_run(tmp_path, command, whole):
    """The kernel refuses what rank 1 writes beyond 20 KiB a file, as a full disk or quota does."""
    out = tmp_path / "run"

    def limit(size: int) -> None:
        training.ranks()[1].rlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    with Training(out, *command, *SLOW, "checkpoint.every_steps=4") as training:
        training.wait_until(lambda: newest_whole_step(out))
        limit(20 * 1024)
        training.wait_until(lambda: "could not be written" in training.text())
        assert verify(list_checkpoints(out / "checkpoints")[-1][1])
        older = newest_whole_step(out)
        limit(resource.RLIM_INFINITY)
        training.wait_until(lambda: newest_whole_step(out) > older)
        limit(20 * 1024)
        assert training.wait(60) == 1, training.text()
    assert training.text().count("warning: the checkpoint of step") >= 3
    assert "rank_00001.safetensors: File too large" in training.text()
    assert "error: the checkpoint of step" in training.text()
    assert "3 times in a row now" in training.text()
    assert "Traceback" not in training.text()
    assert newest_whole_step(out) > older
    assert not list((out / "checkpoints").glob("damaged_*"))
    assert {step: loss for step, loss in losses(out).items() if step <= 4}.keys() == {1, 2, 3, 4}


POISONED = (str(Path(__file__).with_name("poisoned.py")),)


def poisoned(out: Path, digits: Path, poison: str, *more: str) -> Training:
    """A run of one rank whose batches `poison` are not finite."""
    run = ["pretrain", "demo", "--tracking-uri", "off", *arguments(digits), "checkpoint.every_steps=4", *more]
    return Training(out, *run, program=POISONED, POISON=poison, PYTHONPATH=os.getcwd())


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, digits):
    with poisoned(tmp_path / "run", digits, "6:7") as training:
        assert training.wait() == 0, training.text()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "step 7: the gradients are not finite; nothing was updated" in training.text()
    assert [row.get("faults/skipped_steps") for row in rows] == [None] * 6 + [1] * (STEPS - 6)
    assert "faults/rollbacks" not in rows[-1]
    assert rows[6]["train/loss"] != rows[6]["train/loss"]
    assert rows[-1]["train/loss"] < rows[5]["train/loss"]
    assert newest_whole_step(tmp_path / "run") == STEPS


def test_many_in_a_row_go_back_to_a_checkpoint_and_skip_the_data_also_over_a_new_start(tmp_path, digits):
    rollback = ["checkpoint.rollback_after_skips=3", "checkpoint.keep=9"]
    for name, stops in (("one", ["null"]), ("two", ["12", "null"])):
        for stop in stops:
            with poisoned(tmp_path / name, digits, "5:10", *rollback, f"schedule.stop_after_steps={stop}") as training:
                assert training.wait() == 0, training.text()
    # Batches 5 to 7 are skipped as steps 6 to 8; then from step 4 on batch 8 is next, and 8 and 9 are bad too.
    rows = [json.loads(line) for line in (tmp_path / "one" / "events.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] != "warning"]  # that so small a run has not learned much
    assert [(row["event"], row["step"]) for row in rows] == [
        ("start", 0),
        *(("skipped_step", step) for step in (6, 7, 8)),
        ("rollback", 4),
        *(("skipped_step", step) for step in (5, 6)),
        ("end", STEPS),
    ]
    assert rows[4]["skipped_batches"] == 4
    assert losses(tmp_path / "one").keys() == set(range(1, STEPS + 1))
    after = {step: loss for step, loss in losses(tmp_path / "one").items() if step > 6}
    assert after == {step: loss for step, loss in losses(tmp_path / "two").items() if step > 6}
    assert read_metrics(tmp_path / "one" / "metrics.jsonl")[-1]["faults/rollbacks"] == 1


@pytest.mark.slow
def test_going_back_takes_the_same_steps_when_skips_are_read_a_step_late(tmp_path, digits):
    """Steps 6 and 7 are skipped, where nothing is logged or saved: the second is known when step 8 is on its way."""
    rows, found = {}, {}
    for every in (1, 100):
        out = tmp_path / str(every)
        more = ["checkpoint.rollback_after_skips=2", f"tracking.log_every_steps={every}"]
        with poisoned(out, digits, "5:7", *more) as training:
            assert training.wait() == 0, training.text()
        rows[every] = read_metrics(out / "metrics.jsonl")
        happened = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        happened = [row for row in happened if row["event"] != "warning"]
        found[every] = [(row["event"], row["step"], row.get("skipped_batches")) for row in happened]
    assert [row["step"] for row in rows[100]] == [1, 5, STEPS]
    assert found[100] == found[1]
    assert found[1][1:-1] == [("skipped_step", 6, None), ("skipped_step", 7, None), ("rollback", 4, 3)]
    for key in ("train/loss", "train/grad_norm", "faults/skipped_steps", "faults/rollbacks"):
        assert rows[100][-1][key] == rows[1][-1][key], key


@pytest.mark.slow
def test_going_back_takes_the_momentum_encoders_average_back_to_the_checkpoints(tmp_path, digits):
    """Steps 6 to 8 are skipped, and each moves the average; step 6 then moves that of step 5's checkpoint once."""
    out, momentum, steps, done = tmp_path / "run", 0.9, 6 * (1442 // 48), 5
    more = ["checkpoint.rollback_after_skips=3", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    more += [f"moco.momentum={momentum}", f"schedule.stop_after_steps={done + 4}"]
    run = ["pretrain", "pretrain/moco_v3_vit_base", "--tracking-uri", "off", f"data.root={digits}/train", *MOCO, *more]
    environment = {"POISON": f"{done}:{done + 3}", "OBJECTIVE": "mae_scale.tasks.moco.objective:Contrast"}
    with Training(out, *run, program=POISONED, PYTHONPATH=os.getcwd(), **environment) as training:
        assert training.wait() == 0, training.text()
    happened = [(event, step) for event, step, _ in events(out)]
    skipped = [("skipped_step", done + number) for number in (1, 2, 3)]
    assert happened == [("start", 0), *skipped, ("rollback", done), ("end", done + 4)]
    folders = dict(list_checkpoints(out / "checkpoints"))
    before, weights = stored(folders[done], MOMENTUM), stored(folders[done], "weight")
    after = stored(folders[done + 1], MOMENTUM)
    decay = 1 - (1 - momentum) * (1 + math.cos(math.pi * done / steps)) / 2
    for name, average in before.items():
        assert torch.allclose(after[name], decay * average + (1 - decay) * weights[name], rtol=0, atol=1e-6), name
    assert max((weights[name] - before[name]).abs().max().item() for name in before) > 1e-4


def test_a_run_that_never_recovers_stops_after_so_many_rollbacks(tmp_path, digits):
    more = ["checkpoint.rollback_after_skips=2", "checkpoint.max_rollbacks=2"]
    with poisoned(tmp_path / "run", digits, "5:10000", *more) as training:
        assert training.wait() == 1, training.text()
    for batches in (3, 2):
        assert f"back to step 4, and the {batches} batches since are skipped" in training.text()
    assert "error: 2 steps in a row" in training.text()
    assert "has gone back 2 times already (checkpoint.max_rollbacks)" in training.text()
    assert newest_whole_step(tmp_path / "run") == 4


def test_a_gpu_without_enough_memory_is_said_in_one_line(tmp_path, digits):
    run = ["pretrain", "demo", "--tracking-uri", "off", *arguments(digits), "engine.micro_batch=60"]
    program = (str(Path(__file__).with_name("out_of_memory.py")),)
    with Training(tmp_path / "run", *run, program=program, PYTHONPATH=os.getcwd()) as training:
        assert training.wait() == 1, training.text()
    said = training.text()
    assert "error: the GPU has too little memory for engine.micro_batch=60; choose a smaller one" in said
    assert "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.10 GiB is free\n" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_to_three_to_one_rank_and_another_stage_by_the_same_command(tmp_path, digits, whole):
    """The curve within 1e-6 for 20 steps, the learning rate exactly; three ranks hold shards of ZeRO 3."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step, folder in list_checkpoints(out / "checkpoints"):
        if step > 4:
            shutil.rmtree(folder)
    starts = [(3, ["engine.zero_stage=3", "engine.micro_batch=20", "schedule.stop_after_steps=14"]), (1, [])]
    for nproc, more in starts:
        run = ["pretrain", "demo", "--nproc", nproc, "--tracking-uri", "off", *arguments(digits), *more]
        with Training(out, *run) as training:
            assert training.wait() == 0, training.text()
        if nproc == 3:
            # Its weights without those ranks, beside the uninterrupted run's of the same step.
            pair = [find_checkpoint(folder / "checkpoints" / "step_00000014") for folder in (out, whole)]
            mine, theirs = (checkpoint_model(folder)[0].state_dict() for folder in pair)
            # A bias of keys, whose gradient is rounding alone, differs most: 1.3e-5.
            assert max((mine[name] - theirs[name]).abs().max().item() for name in theirs) < 2e-5
    assert "going on from step 14\n" in training.text()
    mine, theirs = losses(out), losses(whole)
    assert max(abs(mine[step] - theirs[step]) for step in theirs) < 1e-6
    rates = [[row["train/lr"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (out, whole)]
    assert rates[0] == rates[1]


@pytest.mark.timeout(900)
def test_random_kills_leave_no_seam_in_the_curve(tmp_path, digits):
    """Two here; `make test-all` has twelve, `make torture` any number."""
    report = torture(tmp_path, digits, kills=2, seed=int(os.environ.get("TORTURE_SEED", "0")), say=print)
    print(report.table(), file=sys.stderr)
    assert sum(report.kills.values()) == 2
    assert (report.lost, report.mismatching, report.damaged) == (0, 0, 0)
