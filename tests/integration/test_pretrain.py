"""`mae-scale pretrain` as a user runs it: real images through DALI into DeepSpeed, tracked in MLflow."""

import json
import sys
import threading
import time

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors import safe_open

from data_pipeline.order import epoch_permutation
from mae_scale import cli
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.tracking.metrics_log import read_metrics

TINY = [
    "data.global_batch=128",
    "optim.base_lr=2e-3",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "tracking.log_every_steps=1",
]
STEPS = 2 * (1442 // 128)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits, mae_scale):
    """A whole run on two ranks; its output folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = mae_scale("pretrain", "demo", "--nproc", 2, "--out", out, *arguments(digits))
    assert done.returncode == 0, done.stderr
    return out, done


def arguments(digits, *more: str) -> list[str]:
    return [f"data.root={digits}/train", f"data.val_root={digits}/val", *TINY, *more]


def losses(out) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(out / "metrics.jsonl")}


def test_a_run_logs_every_step_and_learns(uninterrupted):
    out, done = uninterrupted
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    names = {"train/loss", "train/lr", "train/grad_norm", "perf/images_per_second", "perf/step_time_s"}
    names |= {"perf/data_wait_s", "memory/peak_gib", "data/replaced_images", "step", "epoch", "time"}
    assert names <= rows[0].keys()
    assert rows[0]["train/lr"] == 0
    assert max(row["train/lr"] for row in rows) == pytest.approx(2e-3 * 128 / 256)
    assert rows[-1]["epoch"] == 2
    assert f"step {STEPS}/{STEPS}" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_run_leaves_recipe_checkpoint_weights_and_figures(uninterrupted):
    out, _ = uninterrupted
    assert (out / "recipe.yaml").exists()
    checkpoint = out / "checkpoints" / f"step_{STEPS:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["engine"]) == (STEPS, 2, "deepspeed ZeRO 2")
    assert all((checkpoint / name).stat().st_size == size for name, size in manifest["files"].items())
    with safe_open(out / "export" / "model.safetensors", "pt") as weights:
        assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "decoder_pred.weight"} <= set(weights.keys())
    for name in ("reconstructions.png", "loss_curve.png"):
        with Image.open(out / "figures" / name) as picture:
            assert min(picture.size) > 300


def test_a_run_is_in_mlflow_with_parameters_tags_metrics_and_files(uninterrupted):
    out, _ = uninterrupted
    client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    run = client.get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == sorted(losses(out).items())
    assert (run.data.params["model.width"], run.data.params["engine.zero_stage"]) == ("32", "2")
    assert (run.data.tags["world_size"], run.data.tags["engine"]) == ("2", "deepspeed ZeRO 2")
    assert run.info.status == "FINISHED"
    files = [f.path for folder in ("", "figures") for f in client.list_artifacts(run.info.run_id, folder)]
    expected = {"recipe.yaml", "engine.json", "figures/reconstructions.png", "figures/loss_curve.png"}
    assert expected <= set(files)


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(tmp_path, digits, mae_scale, uninterrupted):
    whole, _ = uninterrupted
    for stop in ("schedule.stop_after_steps=5", "schedule.stop_after_steps=null"):
        done = mae_scale("pretrain", "demo", "--nproc", 2, "--out", tmp_path / "r", *arguments(digits, stop))
        assert done.returncode == 0, done.stderr
    assert "going on from step 5" in done.stdout
    assert losses(tmp_path / "r") == losses(whole)
    again = mae_scale("pretrain", "demo", "--nproc", 2, "--out", tmp_path / "r", *arguments(digits))
    assert again.returncode == 0, again.stderr
    assert f"all {STEPS} steps are done" in again.stdout
    assert losses(tmp_path / "r") == losses(whole)


def test_one_rank_another_engine_micro_batch_and_threads_give_the_same_curve(
    tmp_path, digits, mae_scale, uninterrupted
):
    whole, _ = uninterrupted
    other = ["engine.backend=fairscale", "engine.zero_stage=1", "engine.micro_batch=32", "data.threads=3"]
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "r", "--tracking-uri", "off", *arguments(digits, *other))
    assert done.returncode == 0, done.stderr
    mine, theirs = losses(tmp_path / "r"), losses(whole)
    assert max(abs(mine[step] - theirs[step]) for step in theirs) < 1e-6
    assert not (tmp_path / "mlflow.db").exists()


def test_an_image_that_turns_bad_is_named_replaced_and_counted(tmp_path, digits, mae_scale):
    """Beside it, the ablation's switches: PCA target, block masking, colour jitter, mask tokens in the encoder."""
    data, out = tmp_path / "data", tmp_path / "r"
    data.mkdir()
    for number, image in enumerate(sorted((digits / "train").rglob("*.jpg"))[:64]):
        (data / f"{number:03d}.jpg").write_bytes(image.read_bytes())
    switches = ["target=pca", "masking=block", "mask_ratio=0.5", "encoder_mask_tokens=true", "patch_size=8"]
    command = ["pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits), f"data.root={data}"]
    command += ["data.global_batch=64", "data.augmentation=random_resized_crop_color_jitter"]
    command += [f"model.{switch}" for switch in switches]
    assert mae_scale(*command, "schedule.stop_after_steps=1").returncode == 0
    (data / "007.jpg").write_bytes(b"not a picture")
    done = mae_scale(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("007.jpg") == 1
    assert [row["data/replaced_images"] for row in read_metrics(out / "metrics.jsonl")] == [0, 1]


def test_bad_images_of_all_ranks_together_are_held_against_the_limit(tmp_path, digits, mae_scale):
    data, out = tmp_path / "data", tmp_path / "r"
    data.mkdir()
    for number, image in enumerate(sorted((digits / "train").rglob("*.jpg"))[:64]):
        (data / f"{number:03d}.jpg").write_bytes(image.read_bytes())
    command = ["pretrain", "demo", "--out", out, "--nproc", 2, "--tracking-uri", "off", *arguments(digits)]
    command += [f"data.root={data}", "data.global_batch=64", "data.bad_image_limit=0.05"]  # three of 64
    assert mae_scale(*command, "schedule.stop_after_steps=1").returncode == 0
    share = epoch_permutation(0, 1, 64)
    for image in (*share[:2], *share[32:34]):  # two in each rank's half of the second batch
        (data / f"{image:03d}.jpg").write_bytes(b"not a picture")
    done = mae_scale(*command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 images turned bad after indexing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_rank_ends_the_run_with_a_clear_error_and_the_next_start_goes_on(tmp_path, digits, mae_scale):
    out = tmp_path / "r"
    command = ["pretrain", "demo", "--nproc", 2, "--out", out, "--tracking-uri", "off", *arguments(digits)]
    command += ["checkpoint.every_steps=5"]

    def kill_one_rank() -> None:
        while not (out / "checkpoints" / "step_00000005" / "manifest.json").exists():
            time.sleep(0.05)
        ranks = [p for p in psutil.process_iter() if "LOCAL_RANK" in environment_of(p) and str(out) in p.cmdline()]
        next(p for p in ranks if environment_of(p)["LOCAL_RANK"] == "1").kill()

    killer = threading.Thread(target=kill_one_rank, daemon=True)
    killer.start()
    done = mae_scale(*command, "schedule.epochs=40")
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: rank 1 was killed by SIGKILL")
    newest, _ = list_checkpoints(out / "checkpoints")[-1]
    again = mae_scale(*command, "schedule.epochs=40", f"schedule.stop_after_steps={newest + 3}")
    assert again.returncode == 0, again.stderr
    assert f"going on from step {newest}" in again.stdout
    assert list(losses(out)) == list(range(1, newest + 4))


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


WRONG = {
    "unknown key": (["model.widht=3"], "did you mean 'model.width'?"),
    "no data": (["data.root=null"], "data.root is not set"),
    "missing folder": (["data.root=/no/such/folder"], "does not exist"),
    "patch that does not fit": (["model.patch_size=5"], "not a multiple"),
    "batch larger than the data": (["data.global_batch=4096"], "there are 1442 images"),
    "ranks that do not fit": (["data.global_batch=127"], "does not divide by 2 ranks"),
    "fp16 on a CPU": (["engine.precision=fp16"], "needs a GPU"),
    "tracking in a folder": (["tracking.uri=file:///tmp/x"], "tracking URI"),
    "grid masking at a ratio it cannot do": (["model.masking=grid", "model.mask_ratio=0.6"], "ratio"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line_and_exit_code_2(case, tmp_path, digits, monkeypatch, capsys):
    overrides, message = WRONG[case]
    command = ["mae-scale", "pretrain", "demo", "--nproc", "2", "--out", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", [*command, *arguments(digits, *overrides)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_another_recipe_and_another_number_of_ranks_are_refused_in_the_same_folder(
    uninterrupted, digits, mae_scale, monkeypatch, capsys
):
    out, _ = uninterrupted
    refused = mae_scale("pretrain", "demo", "--nproc", 2, "--out", out, *arguments(digits, "model.mask_ratio=0.5"))
    assert refused.returncode == 2
    assert "model.mask_ratio: 0.75 -> 0.5" in refused.stderr
    refused = mae_scale("pretrain", "demo", "--out", out, *arguments(digits))
    assert refused.returncode == 2
    assert "was written with world size 2, this start has 1" in refused.stderr
    assert "Traceback" not in refused.stderr
