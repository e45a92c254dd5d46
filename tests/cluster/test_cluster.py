"""Jobs on a real Slurm of two nodes: training, stopping, requeueing, chains, and the templates as sbatch reads them."""

import contextlib
import itertools
import json
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

from tests.cluster.conftest import TEMPLATES, Cluster, last_step, losses, manifest_steps
from tests.dense import TRAIN, VAL, scenes_in
from tests.tiny import STEPS_PER_EPOCH
from tests.tiny import arguments as tiny_arguments

pytestmark = pytest.mark.timeout(300)

EPOCHS = 40
STEPS = EPOCHS * STEPS_PER_EPOCH
VALIDATION_IMAGES = 1797 - 1442


def arguments(digits, *more: str) -> list[str]:
    quick = [f"schedule.epochs={EPOCHS}", "checkpoint.every_steps=10", "checkpoint.every_epochs=null"]
    return tiny_arguments(digits, *quick, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits, mae_scale):
    """The losses of the run that the jobs below do, by one rank and never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = mae_scale("pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits))
    assert done.returncode == 0, done.stderr
    return losses(out)


def test_every_template_is_accepted_for_16_nodes_of_8_gpus(cluster: Cluster):
    templates = sorted(TEMPLATES.glob("*.sbatch"))
    assert {"pretrain.sbatch", "finetune.sbatch", "scaling.sbatch"} <= {t.name for t in templates}
    for template in templates:
        tested = cluster.call("sbatch", "--test-only", "--partition=big", "--nodes=16", template, "demo", "--out", "x")
        assert "using 3072 processors on nodes big[1-16]" in tested.stderr
        for wrong in ("--nodes=17", "--gpus-per-node=9"):
            refused = cluster.call(
                "sbatch", "--test-only", "--partition=big", "--nodes=16", wrong, template, check=False
            )
            assert refused.returncode != 0


class TestOneRunThroughEveryFault:
    """One run of two nodes with two ranks each; what befalls it befalls it in this order."""

    @pytest.fixture(scope="class")
    def run(self, cluster: Cluster, tmp_path_factory, digits):
        folder = tmp_path_factory.mktemp("faults")
        # Relative, as a user writes it.
        job = cluster.sbatch(
            "--nodes=2", TEMPLATES / "pretrain.sbatch", "demo", "--out", "run", *arguments(digits), cwd=folder
        )
        yield job, folder / "run", folder / f"{job}.log"
        cluster.call("scancel", job, check=False)

    def test_two_nodes_train_with_two_ranks_each(self, cluster: Cluster, run):
        job, out, log = run
        cluster.wait_for_step(job, out, 12, log)
        assert "4 rank(s) on cpu x 30 images" in log.read_text()
        assert [cluster.rank(job, rank).environ()["SLURMD_NODENAME"] for rank in range(4)] == 2 * ["node1"] + 2 * [
            "node2"
        ]

    def test_usr1_writes_a_checkpoint_requeues_and_the_job_goes_on_from_there(self, cluster: Cluster, run):
        job, out, log = run
        cluster.call("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for_start(job, 1, log)
        stopped_at = last_step(out)
        assert manifest_steps(out)[-1] == stopped_at < STEPS
        assert f"stopped with a checkpoint at step {stopped_at}: requeued" in log.read_text()
        cluster.wait_for_resumption(job, out, stopped_at, log)
        assert f"going on from step {stopped_at}" in log.read_text()

    def test_a_killed_rank_ends_the_others_and_the_job_goes_on(self, cluster: Cluster, run):
        job, out, log = run
        before = manifest_steps(out)[-1]
        cluster.rank(job, 3).send_signal(signal.SIGKILL)
        cluster.wait_for_start(job, 2, log)
        assert "failed with exit code" in log.read_text()
        cluster.wait_for_resumption(job, out, before, log)

    def test_a_killed_slurmd_requeues_the_job_and_it_goes_on(self, cluster: Cluster, run):
        """And nothing of the lost node is left to write into the run."""
        job, out, log = run
        before = manifest_steps(out)[-1]
        lost = [cluster.rank(job, rank) for rank in (2, 3)]
        cluster.kill_slurmd("node2")
        for process in lost:  # they would train on until Slurm takes the node for lost
            process.suspend()
        try:
            cluster.wait(job, "requeued", lambda found: found["Restarts"] == "3", log, timeout_s=120)
        finally:
            cluster.up()
        cluster.wait_for_start(job, 3, log)
        assert not psutil.wait_procs(lost, timeout=30)[1]
        cluster.wait_for_resumption(job, out, before, log)

    def test_a_cancelled_job_stays_cancelled(self, cluster: Cluster, run):
        job, out, log = run
        cluster.call("scancel", job)
        cluster.wait_for_end(job, log, state="CANCELLED")
        assert last_step(out) < STEPS

    def test_it_is_finished_on_one_node(self, cluster: Cluster, run, digits):
        cancelled, out, _ = run
        began_at = manifest_steps(out)[-1]
        job = cluster.sbatch(
            "--nodes=1", TEMPLATES / "pretrain.sbatch", "demo", "--out", "run", *arguments(digits), cwd=out.parent
        )
        log = out.parent / f"{job}.log"
        cluster.wait_for_end(job, log)
        assert f"going on from step {began_at}" in log.read_text()
        assert "2 rank(s) on cpu x 60 images" in log.read_text()
        assert (out / "export" / "model.safetensors").exists()
        assert cluster.job(cancelled)["JobState"] == "CANCELLED"

    def test_its_curve_has_no_seam(self, run, whole):
        _, out, _ = run
        mine = losses(out)
        assert mine.keys() == whole.keys()
        assert max(abs(mine[step] - whole[step]) for step in whole) < 1e-6


def test_the_ranks_of_a_lost_node_leave_once_the_next_start_has_the_run(cluster: Cluster, tmp_path, digits):
    """A killed slurmd leaves its ranks at work; Slurm gives the job to the other node all the same."""
    out = tmp_path / "run"
    endless = arguments(digits, "schedule.epochs=100000")
    job = cluster.sbatch("--nodes=1", TEMPLATES / "pretrain.sbatch", "demo", "--out", "run", *endless, cwd=tmp_path)
    log = tmp_path / f"{job}.log"
    cluster.wait_for_step(job, out, 12, log)
    lost = [cluster.rank(job, rank) for rank in (0, 1)]
    cluster.kill_slurmd(lost[0].environ()["SLURMD_NODENAME"])
    try:
        cluster.wait_for_start(job, 1, log)
        assert not psutil.wait_procs(lost, timeout=90)[1]
        taken_over = manifest_steps(out)[-1]
        cluster.wait_for_resumption(job, out, taken_over, log)
    finally:
        cluster.call("scancel", job, check=False)
        cluster.up()
    said = log.read_text()  # not what the lost ranks say: their srun has ended
    assert "run was held by an earlier start of this job" in said
    assert "Traceback" not in said
    assert losses(out)  # each step once


def chain(cluster: Cluster, out: Path, recipes: list, overrides: list[str]) -> tuple[list[str], list[Path], list[Path]]:
    """Submit recipes as a chain, two nodes with two ranks each; the jobs' ids, runs and logs."""
    shape = ["--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 1]
    sent = cluster.call(sys.executable, "-m", "mae_scale", "submit", *recipes, *shape, "--out", out, *overrides)
    jobs = [line.split()[1].strip(",:") for line in sent.stdout.splitlines() if line.startswith("job ")]
    labels = [str(Path(recipe).stem if Path(recipe).is_file() else recipe).replace("/", "-") for recipe in recipes]
    logs = [out / "slurm" / f"{i}-{labels[i - 1]}-{job}.log" for i, job in enumerate(jobs, start=1)]
    return jobs, [out / label for label in labels], logs


@pytest.mark.timeout(600)
def test_a_chain_waits_for_the_real_end_of_a_requeued_link_and_starts_each_from_the_one_before(
    cluster: Cluster, tmp_path, digits
):
    """Pre-training, fine-tuning, and from there fine-tuning with larger images."""
    small, large = tmp_path / "small.yaml", tmp_path / "large.yaml"
    small.write_text("extends: finetune/demo\ndata: {labels_per_class: null}\n")
    large.write_text(f"extends: {small}\nmodel: {{image_size: 64}}\n")
    jobs, runs, logs = chain(cluster, tmp_path / "c", ["demo", small, large], arguments(digits, "schedule.epochs=4"))
    cluster.wait_for_step(jobs[0], runs[0], 5, logs[0])
    cluster.call("scancel", "--batch", "--signal=USR1", jobs[0])
    cluster.wait_for_start(jobs[0], 1, logs[0])
    for job in jobs[1:]:
        waiting = cluster.job(job)
        assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "Dependency")
    for job, run, log in zip(jobs, runs, logs, strict=True):
        cluster.wait_for_end(job, log)
        assert last_step(run) == 4 * STEPS_PER_EPOCH
        assert (run / "export" / "model.safetensors").exists()
    for run, before, log in zip(runs[1:], runs, logs[1:], strict=False):
        assert f"tensors from {before}" in log.read_text()
        assert json.loads((run / "evaluation.json").read_text())["images"] == VALIDATION_IMAGES
    positions = load_file(runs[2] / "export" / "model.safetensors")["pos_embed"]
    assert positions.shape == (1, 1 + (64 // 8) ** 2, 32)


@pytest.mark.timeout(600)
def test_a_chain_trains_a_tokeniser_then_beit_on_its_words_and_a_classifier_on_beit(cluster: Cluster, tmp_path, digits):
    """BEiT loses a rank in the middle, and goes on with the words of the same tokeniser."""
    beit, classifier = tmp_path / "beit.yaml", tmp_path / "classifier.yaml"
    beit.write_text("extends: pretrain/beit_demo\nmodel: {target: tokens}\n")
    classifier.write_text("extends: finetune/beit_demo\ndata: {labels_per_class: null}\n")
    quick = ["schedule.epochs=4", "checkpoint.every_steps=5", "checkpoint.every_epochs=null", "tokeniser.width=8"]
    recipes = ["pretrain/dvae_demo", beit, classifier]
    jobs, runs, logs = chain(cluster, tmp_path / "c", recipes, tiny_arguments(digits, *quick))
    cluster.wait_for_end(jobs[0], logs[0])
    cluster.wait_for_step(jobs[1], runs[1], 7, logs[1])
    cluster.rank(jobs[1], 3).send_signal(signal.SIGKILL)
    cluster.wait_for_start(jobs[1], 1, logs[1])
    for job, run, log in zip(jobs[1:], runs[1:], logs[1:], strict=True):
        cluster.wait_for_end(job, log)
        assert last_step(run) == 4 * STEPS_PER_EPOCH
    assert "going on from step" in logs[1].read_text()
    assert recipe_of(runs[1])["tokeniser"]["weights"] == str(runs[0])
    assert f"tensors from {runs[1]}" in logs[2].read_text()
    assert json.loads((runs[2] / "evaluation.json").read_text())["images"] == VALIDATION_IMAGES


def test_a_chain_trains_a_detector_on_the_encoder_before_it_and_goes_on_without_a_rank(cluster: Cluster, tmp_path):
    """Each link has images of its own; the detector loses a rank in the middle."""
    scenes = scenes_in(tmp_path)
    model = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 2}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    often = {"every_steps": 3, "every_epochs": None}
    images = {"root": f"{scenes}/train/images", "val_root": f"{scenes}/val/images", "global_batch": 8, "fraction": None}
    first = {
        "extends": "demo",
        "model": model | decoder,
        "data": {"root": f"{scenes}/train/images", "global_batch": 8},
        "schedule": {"epochs": 3, "warmup_epochs": 1},
    }
    second = {
        "extends": "detection/demo",
        "model": model,
        "data": images,
        "schedule": {"epochs": 12, "warmup_epochs": 1},
        "detection": {
            "annotations": f"{scenes}/train/instances.json",
            "val_annotations": f"{scenes}/val/instances.json",
            "pretraining_size": 32,
            "window": 2,
            "channels": 8,
            "sampled_boxes": 16,
        },
        "checkpoint": often,
        "tracking": {"log_every_steps": 1, "evaluate_every_epochs": 12},
    }
    recipes = []
    for name, recipe in (("first", first), ("second", second)):
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(recipe))
    jobs, runs, logs = chain(cluster, tmp_path / "c", recipes, [])
    cluster.wait_for_end(jobs[0], logs[0])
    cluster.wait_for_step(jobs[1], runs[1], 7, logs[1])
    cluster.rank(jobs[1], 3).send_signal(signal.SIGKILL)
    cluster.wait_for_start(jobs[1], 1, logs[1])
    cluster.wait_for_end(jobs[1], logs[1])
    assert "going on from step" in logs[1].read_text()
    assert f"tensors from {runs[0]}" in logs[1].read_text()
    assert last_step(runs[1]) == 12 * (TRAIN // 8)
    assert json.loads((runs[1] / "evaluation.json").read_text())["images"] == VAL


def recipe_of(out: Path) -> dict:
    """A run's recipe, as it is written in its folder."""
    return yaml.safe_load((out / "recipe.yaml").read_text())


def test_moco_v3_loses_a_rank_and_its_curve_is_that_of_one_rank(cluster: Cluster, tmp_path, digits, mae_scale):
    more = ["model.name=null", "model.image_size=32", "moco.hidden=64", "moco.dim=32", "engine.precision=null"]
    quick = ["schedule.epochs=4", "checkpoint.every_steps=5", "checkpoint.every_epochs=null", *more]
    recipe = ["pretrain/moco_v3_vit_base", "--out", "run", *tiny_arguments(digits, "tracking.uri=off", *quick)]
    job = cluster.sbatch("--nodes=2", TEMPLATES / "pretrain.sbatch", *recipe, cwd=tmp_path)
    out, log = tmp_path / "run", tmp_path / f"{job}.log"
    cluster.wait_for_step(job, out, 7, log)
    cluster.rank(job, 2).send_signal(signal.SIGKILL)
    cluster.wait_for_start(job, 1, log)
    cluster.wait_for_end(job, log)
    assert "going on from step" in log.read_text()
    recipe[2] = tmp_path / "whole"
    done = mae_scale("pretrain", *recipe)
    assert done.returncode == 0, done.stderr
    mine, whole = losses(out), losses(tmp_path / "whole")
    assert mine.keys() == whole.keys()
    assert max(abs(mine[step] - whole[step]) for step in whole) < 1e-4


def test_a_refused_recipe_is_not_requeued_and_ends_its_chain(cluster: Cluster, tmp_path, digits):
    second = tmp_path / "second.yaml"
    second.write_text("extends: demo\n")
    command = [sys.executable, "-m", "mae_scale", "submit", "demo", second, "--nodes", 2, "--gpus-per-node", 2]
    command += ["--cpus-per-task", 1, "--out", tmp_path / "c", *arguments(digits, "data.root=/not/there")]
    sent = cluster.call(*command)
    first, then = [line.split()[1].strip(",:") for line in sent.stdout.splitlines() if line.startswith("job ")]
    log = tmp_path / "c" / "slurm" / f"1-demo-{first}.log"
    ended = cluster.wait_for_end(first, log, state="FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "/not/there" in log.read_text()
    cluster.wait_for_end(then, log, state="CANCELLED")


def test_four_ranks_that_refuse_a_recipe_say_so_in_one_line(cluster: Cluster, tmp_path):
    job = cluster.sbatch("--nodes=2", TEMPLATES / "pretrain.sbatch", "demo", "--out=run", "data.roott=x", cwd=tmp_path)
    log = tmp_path / f"{job}.log"
    assert cluster.wait_for_end(job, log, state="FAILED")["ExitCode"] == "2:0"
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert errors == ["error: recipe demo: unknown key 'data.roott'; did you mean 'data.root'?"]


def test_a_job_without_a_new_step_in_two_starts_stops(cluster: Cluster, tmp_path):
    job = cluster.sbatch(
        "--nodes=2", TEMPLATES / "pretrain.sbatch", "demo", "--out=run", cwd=tmp_path, MAE_SCALE_CONTAINER="false"
    )
    log = tmp_path / f"{job}.log"
    ended = cluster.wait_for_end(job, log, state="FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "1")
    assert "stopped, not requeued: two starts brought no step after 0" in log.read_text()


def test_jobs_share_a_node_each_with_its_own_gpus_memory_and_port(cluster: Cluster, tmp_path, digits):
    """As a site asks for it that knows --gres only and does not give whole nodes, with its own copy of the templates.

    Another program listens at the port that the second job would take; the environment is told by the copy alone.
    """
    cluster.call(sys.executable, "-m", "mae_scale", "slurm", tmp_path / "jobs")
    shared = ["--nodes=1", "--nodelist=node1", "--gres=gpu:2", "--oversubscribe", "--mem=1G"]
    site = {"VIRTUAL_ENV": "", "MAE_SCALE_SRUN_OPTIONS": "--mpi=none --export=ALL,SITE='two  words'"}
    jobs: list[str] = []
    with socket.socket() as other, contextlib.ExitStack() as stack:
        stack.callback(lambda: cluster.call("scancel", *jobs))
        for name in ("first", "second"):
            command = [*shared, tmp_path / "jobs" / "pretrain.sbatch", "demo", "--out", name, *arguments(digits)]
            jobs.append(cluster.sbatch(*command, cwd=tmp_path, **site))
            if name == "first":
                port = port_of(int(jobs[0]) + 1)
                other.bind(("127.0.0.1", port))
                other.listen()
        for job, name in zip(jobs, ("first", "second"), strict=True):
            cluster.wait_for_step(job, tmp_path / name, 2, tmp_path / f"{job}.log")
        ranks = [cluster.rank(job, 1).environ() for job in jobs]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["node1", "node1"]
    assert sorted(rank["CUDA_VISIBLE_DEVICES"] for rank in ranks) == ["0,1", "2,3"]
    assert [int(rank["MASTER_PORT"]) for rank in ranks] == [port_of(int(jobs[0])), port + 1]
    assert {rank["SITE"] for rank in ranks} == {"two  words"}


def port_of(job: int) -> int:
    """The port of a job's first start, as environment.sh chooses it where it is free."""
    return 20000 + job % 12000


def test_a_scaling_curve_has_a_run_for_each_number_of_nodes(cluster: Cluster, tmp_path, digits):
    array = ["--nodes=2", "--array=1,2", "--ntasks-per-node=1", "--output=%a.log"]
    command = [TEMPLATES / "scaling.sbatch", "demo", "--out", "curve"]
    job = cluster.sbatch(
        *array, *command, *arguments(digits, "schedule.stop_after_steps=4", "tracking.uri=off"), cwd=tmp_path
    )
    for nodes in (1, 2):
        log = tmp_path / f"{nodes}.log"
        cluster.wait_for_end(f"{job}_{nodes}", log)
        assert f"{nodes} rank(s) on cpu x" in log.read_text()
        assert last_step(tmp_path / "curve" / f"nodes_{nodes:04d}") == 4
    curves = [losses(tmp_path / "curve" / f"nodes_{nodes:04d}") for nodes in (1, 2)]
    for one, two in itertools.pairwise(curves):
        assert one == pytest.approx(two, abs=1e-6)


def test_the_report_shows_what_waits_and_a_second_submission_measures_nothing_anew(cluster: Cluster, tmp_path, digits):
    """An array that asks for 3 nodes of 2 as well: refused, and said why; one point is cancelled in the queue."""
    curve, options = tmp_path / "my curve", ["--nodes=2", "--ntasks-per-node=1", "--output=%A_%a.log"]
    quick = arguments(digits, "schedule.stop_after_steps=20")
    command = [TEMPLATES / "scaling.sbatch", "demo", "--out", "my curve", *quick]

    def report(*, check: bool = True) -> dict[str, str]:
        told = cluster.call(
            sys.executable, "-m", "mae_scale", "scaling", "report", curve, "--json", tmp_path / "r.json", check=check
        )
        if told.returncode:
            return {"error": told.stderr}
        points = json.loads((tmp_path / "r.json").read_text())
        for point in points:
            (line,) = (line for line in told.stdout.splitlines() if line.startswith(point["name"]))
            assert point["state"] == "done" or line.endswith(point["state"])
        return {point["name"]: point["state"] for point in points}

    assert "has no points" in report(check=False)["error"]
    held = cluster.sbatch("--hold", *options, "--array=1,2,3,4", *command, cwd=tmp_path)
    waiting = dict.fromkeys([f"nodes_{nodes:04d}" for nodes in (1, 2, 3, 4)], "queued (JobHeldUser)")
    assert report() == waiting
    cluster.call("scontrol", "release", f"{held}_1")
    cluster.wait_for_end(f"{held}_1", tmp_path / f"{held}_1.log")
    assert report() == {**waiting, "nodes_0001": "done"}
    cluster.call("scancel", f"{held}_4")
    for nodes in (2, 3):
        cluster.call("scontrol", "release", f"{held}_{nodes}")
    cluster.wait_for_end(f"{held}_2", tmp_path / f"{held}_2.log")
    cluster.wait_for_end(f"{held}_3", tmp_path / f"{held}_3.log", state="FAILED")
    ended = report()
    assert (ended["nodes_0001"], ended["nodes_0002"], ended["nodes_0004"]) == (
        "done",
        "done",
        "cancelled before its start",
    )
    assert ended["nodes_0003"].startswith("failed: ")
    assert "--array asks for 3 nodes, --nodes gives 2" in ended["nodes_0003"]

    measured = {path: path.read_bytes() for path in curve.glob("*/metrics.jsonl")}
    again = cluster.sbatch(*options, "--array=1,2", *command, cwd=tmp_path)
    for nodes in (1, 2):
        log = tmp_path / f"{again}_{nodes}.log"
        assert cluster.wait_for_end(f"{again}_{nodes}", log)["ExitCode"] == "0:0"
        assert "nothing to do" in log.read_text()
    assert measured == {path: path.read_bytes() for path in curve.glob("*/metrics.jsonl")}
    assert report() == ended
    runs = runs_in(curve / "mlflow.db", "scaling")
    parent = runs.pop("my curve")
    assert {name: run.data.tags["mlflow.parentRunId"] for name, run in runs.items()} == {
        "nodes_0001": parent.info.run_id,
        "nodes_0002": parent.info.run_id,
    }
    assert parent.info.status == "FAILED"
    assert "| nodes_0004 |  | cancelled before its start |" in parent.data.tags["mlflow.note.content"]


def runs_in(database: Path, experiment: str) -> dict[str, Run]:
    """{name: run} of an experiment in a SQLite store of MLflow."""
    client = MlflowClient(f"sqlite:///{database}")
    known = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([known.experiment_id])}


def test_a_sweep_sends_each_run_and_its_transfer_once(cluster: Cluster, tmp_path, digits):
    """The second call finds the jobs in the queue, the third only what is done; a lost point is sent again, alone."""
    out = tmp_path / "ratios"
    command = [sys.executable, "-m", "mae_scale", "sweep", "demo", "model.mask_ratio=0.5,0.75", "--then", "probe/demo"]
    command += ["then.schedule.epochs=6", "--slurm", "--ntasks-per-node", 1, "--gpus-per-node", 0, "--cpus-per-task", 1]
    command += ["--out", out, *tiny_arguments(digits)]
    sent = cluster.call(*command).stdout
    jobs = [line.split()[1].strip(",:") for line in sent.splitlines() if line.startswith("job ")]
    assert len(jobs) == 4
    again = cluster.call(*command).stdout
    assert f"mask_ratio-0.75_seed-0: job {jobs[2]}: " in again
    assert not any(line.startswith("job ") for line in again.splitlines())
    names = ("mask_ratio-0.5_seed-0", "mask_ratio-0.75_seed-0")
    logs = [out / "slurm" / f"{name}{part}-%s.log" for name in names for part in ("", "-then")]
    for job, log in zip(jobs, logs, strict=True):
        cluster.wait_for_end(job, log.with_name(log.name % job))
    after = cluster.call(*command).stdout
    assert [f"{name}: done already" in after for name in names] == [True, True]
    points = json.loads((out / "results.json").read_text())["points"]
    assert [set(point["metrics"]) for point in points] == 2 * [{"val/loss", "train/loss", "then_top1"}]
    shutil.rmtree(out / names[1] / "then")
    lost = cluster.call(*command).stdout.splitlines()
    assert [line.rpartition(" ")[2] for line in lost if line.startswith("job ")] == [str(out / names[1] / "then")]
