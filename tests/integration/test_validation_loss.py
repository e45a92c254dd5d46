"""val/loss and val/knn_top1 of a pre-training run: the same number for every layout, and a peer's number."""

import json

import numpy as np
import pytest
import torch

from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.index import load_index
from data_pipeline.loader import ImageLoader
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.model_folder import export_folder
from mae_scale.checkpoints.store import list_checkpoints, read_manifest
from mae_scale.config.load import load_recipe
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.training.decoding import decoding_on_cpu
from tests.tiny import STEPS_PER_EPOCH, arguments, losses

FROZEN = ["optim.base_lr=1e-30", "schedule.epochs=2", "schedule.stop_after_steps=12", "tracking.uri=off"]
FROZEN += ["tracking.evaluate_every_epochs=1"]
"""Weights that no step changes, so that runs of every layout measure the same ones."""

LAYOUTS = {
    "one rank": (1, []),
    "two ranks, ZeRO 2, micro-batches": (2, ["engine.micro_batch=20"]),
    "two ranks, ZeRO 3": (2, ["engine.zero_stage=3", "engine.activation_checkpointing=none", "data.threads=3"]),
    "two ranks, FairScale": (
        2,
        ["engine.backend=fairscale", "engine.zero_stage=1", "data.global_batch=100", "schedule.stop_after_steps=14"],
    ),
    "compiled": (1, ["engine.compile=true"]),
}
SLOW = ("two ranks, ZeRO 3", "compiled")


def measured(out) -> list[tuple[int, float]]:
    return [(row["step"], row["val/loss"]) for row in read_metrics(out / "metrics.jsonl") if "val/loss" in row]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, digits, mae_scale):
    out = tmp_path_factory.mktemp("runs") / "one"
    done = mae_scale("pretrain", "demo", "--out", out, *arguments(digits, *FROZEN), "tracking.knn_images=500")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in list(LAYOUTS)[1:]]
)
def test_val_loss_is_equal_to_the_digit_for_every_layout(layout, one_rank, tmp_path, digits, mae_scale):
    nproc, overrides = LAYOUTS[layout]
    words = [*arguments(digits, *FROZEN), *overrides, "tracking.knn_images=500"]
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "run", "--nproc", nproc, *words)
    assert done.returncode == 0, done.stderr
    expected = {row["step"]: row for row in read_metrics(one_rank[0] / "metrics.jsonl") if "val/loss" in row}
    found = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row]
    assert len(expected) == len(found) == 1
    (reference,) = expected.values()
    assert found[0]["val/loss"] == reference["val/loss"]
    assert found[0]["val/knn_top1"] == reference["val/knn_top1"]


def test_val_loss_is_what_a_peer_finds_for_the_same_masks(one_rank, digits, tmp_path):
    from transformers import ViTMAEForPreTraining

    out, _ = one_rank
    model, recipe = checkpoint_model(list_checkpoints(out / "checkpoints")[-1][1])
    export_folder(model, None, tmp_path / "hf", "hf")
    peer = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    objective = Reconstruct(model, seed=recipe.seed)
    index = load_index(out / "val_index.npz", digits / "val")
    total = 0.0
    with ImageLoader(index, EvaluationOrder(7), decoding_on_cpu(recipe, augmentation("evaluation"))) as loader:
        for batch in loader:
            noise = objective.noise("validation_mask", 0, batch.sample_ids)
            for image, one in zip(batch.images[batch.valid], noise[batch.valid], strict=True):
                with torch.inference_mode():
                    total += float(peer(pixel_values=image[None], noise=one[None]).loss)
    assert measured(out) == [(STEPS_PER_EPOCH, pytest.approx(total / len(index), rel=1e-5))]


def test_knn_top1_is_between_chance_and_all_and_the_log_line_has_both(one_rank):
    out, printed = one_rank
    (row,) = [row for row in read_metrics(out / "metrics.jsonl") if "val/knn_top1" in row]
    assert 20 < row["val/knn_top1"] < 100  # ten classes: chance is 10
    assert f"val loss {row['val/loss']:.4f}  k-NN top-1 {row['val/knn_top1']:.2f} %" in printed


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_measuring_changes_no_loss_of_the_training(stage, tmp_path, digits, mae_scale):
    found = []
    for name, more in (("measured", ["tracking.evaluate_every_epochs=1", "tracking.knn_images=200"]), ("not", [])):
        out = tmp_path / name
        words = [*arguments(digits, *more), f"engine.zero_stage={stage}", "tracking.uri=off"]
        done = mae_scale("pretrain", "demo", "--nproc", 2, "--out", out, *words)
        assert done.returncode == 0, done.stderr
        found.append(losses(out))
    assert found[0] == found[1]
    assert [step for step, _ in measured(tmp_path / "measured")] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]


def test_a_checkpoint_says_what_was_measured_at_its_step(one_rank):
    out, _ = one_rank
    manifest = read_manifest(list_checkpoints(out / "checkpoints")[-1][1])
    assert manifest["measured"] == {
        name: read_metrics(out / "metrics.jsonl")[-1][name] for name in ("val/loss", "val/knn_top1")
    }


def test_keep_best_follows_the_validation_loss(tmp_path, digits, mae_scale):
    """A rate that grows until it harms: the best checkpoint is an earlier one, and stays."""
    out = tmp_path / "run"
    words = ["schedule.epochs=9", "schedule.warmup_epochs=8", "schedule.stop_after_steps=48", "optim.base_lr=10"]
    words += ["tracking.evaluate_every_epochs=1", "checkpoint.every_epochs=1"]
    words += ["checkpoint.keep=1", "checkpoint.keep_best=val/loss"]
    done = mae_scale("pretrain", "demo", "--out", out, *arguments(digits, *words, "tracking.uri=off"))
    assert done.returncode == 0, done.stderr
    losses = dict(measured(out))
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses)
    kept = [step for step, _ in list_checkpoints(out / "checkpoints")]
    assert kept == sorted({best, max(losses)})
    assert json.loads((out / "checkpoints" / f"step_{best:08d}" / "manifest.json").read_text())["measured"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint.keep_best=val/loss"], "checkpoint.keep_best=val/loss is measured on data.val_root; add data.val"),
        (["checkpoint.keep_best=val/top1", "data.val_root=x"], "belongs to task: classification; use train/loss"),
        (["checkpoint.keep_best=val/knn_top1", "data.val_root=x"], "add tracking.knn_images=10000"),
        (["tracking.knn_images=100"], "tracking.knn_images=100 measures images of data.val_root; add data.val_root="),
        (["tracking.evaluate_every_epochs=0"], "tracking.evaluate_every_epochs=0"),
        (["classifier.evaluate_every_epochs=2"], "has a new name; write 'tracking.evaluate_every_epochs'"),
    ],
)
def test_what_would_never_be_measured_is_refused(overrides, said, tmp_path, call):
    code, _, error = call("pretrain", "demo", "--out", tmp_path / "run", "data.root=x", *overrides)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error


def test_the_masks_of_validation_are_functions_of_seed_and_image():
    with torch.device("meta"):
        from mae_scale.models.build import build_model

        objectives = [Reconstruct(build_model(load_recipe("demo")), seed=seed) for seed in (0, 0, 1)]
    first, again, other = (objective.noise("validation_mask", 0, np.arange(9)) for objective in objectives)
    assert torch.equal(first, again)
    assert torch.equal(first[[3, 7]], objectives[0].noise("validation_mask", 0, np.array([3, 7])))
    assert not torch.equal(first, other)
    assert not torch.equal(first[3], first[7])
