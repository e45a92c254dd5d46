"""`mae-scale pretrain` as a user runs it: real images through DALI into DeepSpeed, tracked in MLflow."""

import json
import sys

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors import safe_open

from data_pipeline.plan import epoch_permutation
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.store import list_checkpoints, verify
from mae_scale.cli.main import main
from mae_scale.config.load import load_recipe
from mae_scale.models.build import build_model
from mae_scale.models.weights.autoencoder import load_hf, load_official, load_timm
from mae_scale.models.weights.files import read_weights
from mae_scale.planning.flops import mae_forward_flops, training_flops
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_artifacts import steps_of_figure
from tests.tiny import STEPS, arguments, losses


def pictures(out) -> list[int]:
    """The steps at which a run's reconstructions were drawn; the newest also lies beside them."""
    files = sorted((out / "figures" / "reconstructions").iterdir())
    assert files[-1].read_bytes() == (out / "figures" / "reconstructions.png").read_bytes()
    return [int(file.name.removeprefix("step_").removesuffix(".png")) for file in files]


def figure_in_mlflow(out) -> list[int]:
    """The steps of the figure in MLflow's database, as often as it has them."""
    client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    return steps_of_figure(client, json.loads((out / "mlflow.json").read_text())["run_id"], "reconstructions")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits, mae_scale):
    """A whole run on two ranks; its output folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = mae_scale("pretrain", "demo", "--nproc", 2, "--out", out, *arguments(digits))
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_logs_every_step_and_learns(uninterrupted):
    out, done = uninterrupted
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    names = {"train/loss", "train/lr", "train/grad_norm", "perf/images_per_second", "perf/step_time_s"}
    names |= {"perf/data_wait_s", "memory/peak_gib", "images_seen", "compute_pflops", "step", "epoch", "time"}
    assert names == rows[1].keys()  # no counter of faults, as there are none
    assert rows[-1]["images_seen"] == 120 * STEPS
    each = mae_forward_flops(
        image_size=32, patch_size=8, width=32, depth=2, decoder_width=16, decoder_depth=1, mask_ratio=0.75
    )
    assert rows[-1]["compute_pflops"] == pytest.approx(120 * STEPS * training_flops(each) / 1e15)
    assert rows[0]["train/lr"] == 0
    assert max(row["train/lr"] for row in rows) == pytest.approx(2e-3 * 120 / 256)
    assert rows[-1]["epoch"] == 2
    assert f"step {STEPS}/{STEPS}" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_run_leaves_recipe_checkpoint_weights_and_figures(uninterrupted):
    out, _ = uninterrupted
    assert (out / "recipe.yaml").exists()
    checkpoint = out / "checkpoints" / f"step_{STEPS:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["engine"]) == (STEPS, 2, "deepspeed ZeRO 2")
    assert verify(checkpoint) == manifest
    assert manifest["files"].keys() == {"rank_00000.safetensors", "rank_00001.safetensors"}
    assert (manifest["epoch"], manifest["zero_stage"], manifest["recipe"]["data"]["global_batch"]) == (2, 2, 120)
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
    assert (run.info.run_name, run.data.tags["mae_scale.task"]) == ("whole, pretrain 32x2, seed 0", "pretrain")
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(
        "**pretrain** of 32x2 (width 32, 2 blocks, patches of 8 px) at 32 px: 2 epochs of 1,442 images"
    )
    assert "mae-scale pretrain demo --nproc 2" in note
    images = [(one.tags[0].value, json.loads(one.dataset.profile)) for one in run.inputs.dataset_inputs]
    assert sorted(images, key=str) == [
        ("training", {"num_images": 1442, "num_classes": 10}),
        ("validation", {"num_images": 355, "num_classes": 10}),
    ]
    files = [f.path for folder in ("", "figures") for f in client.list_artifacts(run.info.run_id, folder)]
    expected = {"recipe.yaml", "engine.json", "figures/reconstructions.png", "figures/loss_curve.png"}
    assert expected <= set(files)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(tmp_path, digits, mae_scale, uninterrupted):
    """With a picture each epoch and at the end of each start, where the whole run has one: they change nothing."""
    whole, _ = uninterrupted
    for stop in ("schedule.stop_after_steps=5", "schedule.stop_after_steps=null"):
        recipe = arguments(digits, stop, "tracking.reconstruct_every_epochs=1")
        done = mae_scale("pretrain", "demo", "--nproc", 2, "--out", tmp_path / "r", *recipe)
        assert done.returncode == 0, done.stderr
        assert pictures(tmp_path / "r") == figure_in_mlflow(tmp_path / "r")
    assert "going on from step 5" in done.stdout
    assert losses(tmp_path / "r") == losses(whole)
    assert (pictures(tmp_path / "r"), pictures(whole)) == ([5, 12, 24], [24])
    again = mae_scale("pretrain", "demo", "--nproc", 2, "--out", tmp_path / "r", *arguments(digits))
    assert again.returncode == 0, again.stderr
    assert f"all {STEPS} steps are done" in again.stdout
    assert losses(tmp_path / "r") == losses(whole)
    assert figure_in_mlflow(tmp_path / "r") == [5, 12, 24]


def test_one_rank_another_engine_micro_batch_and_threads_give_the_same_curve(
    tmp_path, digits, mae_scale, uninterrupted
):
    whole, _ = uninterrupted
    other = ["engine.backend=fairscale", "engine.zero_stage=1", "engine.micro_batch=15", "data.threads=3"]
    other.append("tracking.reconstruct_every_epochs=1")
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "r", "--tracking-uri", "off", *arguments(digits, *other))
    assert done.returncode == 0, done.stderr
    mine, theirs = losses(tmp_path / "r"), losses(whole)
    assert max(abs(mine[step] - theirs[step]) for step in theirs) < 1e-6
    assert pictures(tmp_path / "r") == [12, 24]
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
    assert [row.get("data/replaced_images") for row in read_metrics(out / "metrics.jsonl")] == [None, 1]


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


@pytest.mark.slow
def test_a_cache_serves_the_second_epoch_and_changes_nothing(tmp_path, digits, mae_scale, uninterrupted):
    whole, _ = uninterrupted
    command = ["pretrain", "demo", "--nproc", 2, "--out", tmp_path / "r", "--tracking-uri", "off"]
    overrides = [f"data.cache={tmp_path}/disk/cache", "data.cache_gib=1"]
    for stop in ("schedule.stop_after_steps=12", "schedule.stop_after_steps=null"):  # an epoch has 12 steps
        done = mae_scale(*command, *arguments(digits, *overrides, stop))
        assert done.returncode == 0, done.stderr
        assert "data.cache" not in done.stdout + done.stderr
    assert losses(tmp_path / "r") == losses(whole)
    shares = [row["data/cache_hits"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")]
    assert shares[:12] == [0] * 12
    assert min(shares[12:]) >= 118 / 120  # two of 1,442 images were left out of the first epoch
    assert "data/cache_hits" not in read_metrics(whole / "metrics.jsonl")[0]
    without = mae_scale(*command, *arguments(digits))  # where the cache is may change, also to nowhere
    assert (without.returncode, "all 24 steps are done" in without.stdout) == (0, True), without.stderr


WRONG = {
    "unknown key": (["model.widht=3"], "did you mean 'model.width'?"),
    "no data": (["data.root=null"], "data.root is not set"),
    "missing folder": (["data.root=/no/such/folder"], "does not exist"),
    "patch that does not fit": (["model.patch_size=5"], "not a multiple"),
    "batch larger than the data": (["data.global_batch=4096"], "there are 1442 images"),
    "ranks that do not fit": (["data.global_batch=127"], "is not divisible by 2 ranks"),
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
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_another_recipe_is_refused_in_the_same_folder(uninterrupted, digits, mae_scale):
    out, _ = uninterrupted
    refused = mae_scale("pretrain", "demo", "--nproc", 2, "--out", out, *arguments(digits, "model.mask_ratio=0.5"))
    assert refused.returncode == 2
    assert "model.mask_ratio: 0.75 -> 0.5" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("layout", "suffix", "load"),
    [
        ("official", ".pth", load_official),
        ("official", ".safetensors", load_official),
        ("timm", ".safetensors", load_timm),
        ("hf", ".safetensors", load_hf),
        ("safetensors", ".safetensors", lambda model, state: model.load_state_dict(state)),
    ],
)
def test_a_checkpoint_of_two_ranks_is_exported_in_every_layout(layout, suffix, load, uninterrupted, call, tmp_path):
    out, _ = uninterrupted
    model, _ = checkpoint_model(list_checkpoints(out / "checkpoints")[-1][1])
    file = tmp_path / f"weights{suffix}"
    assert call("export", out, file, "--format", layout)[0] == 0
    fresh = build_model(load_recipe("demo", arguments("unused")))
    load(fresh, read_weights(file))
    mine, theirs = fresh.encoder.state_dict(), model.encoder.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    if layout == "official":
        finished = read_weights(out / "export" / "model.safetensors")
        assert all(torch.equal(tensor, finished[name]) for name, tensor in read_weights(file).items())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{missing}", "x.pth"], 2, "is not a folder; expected a run's folder"),
        (["{out}", "x.bin"], 2, "expected a name that ends in .safetensors or .pth"),
        (["{out}", "x.pth", "--format", "onnx"], 2, "--format onnx is not known; expected official, timm, hf"),
        (["{out}/figures", "x.pth"], 2, "holds no checkpoint; expected a run's folder"),
    ],
)
def test_an_export_that_cannot_be_done_is_one_clear_line(words, code, said, uninterrupted, call, tmp_path):
    filled = [a.format(missing=tmp_path / "missing", out=uninterrupted[0]) for a in words]
    ended, _, error = call("export", *filled)
    assert ended == code
    assert error.count("\n") == 1
    assert said in error
