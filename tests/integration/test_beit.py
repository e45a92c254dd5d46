"""BEiT as a user runs it: pre-trained on real images, killed, resumed, fine-tuned, exported; and what is refused."""

import json
import math
import shutil
import signal

import pytest
import torch

import mae_scale as package
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.models.beit import Beit
from mae_scale.models.weights.files import read_weights
from mae_scale.tracking.metrics_log import read_metrics
from tests.faults.harness import Training
from tests.tiny import STEPS, arguments, losses
from tests.tokenisers import tokeniser_file

WORDS = 32
OFF = ["--tracking-uri", "off"]
BEIT = ["model.encoder=beit", "model.layer_scale=0.1"]


@pytest.fixture(scope="module")
def tokeniser(digits, tmp_path_factory):
    return tokeniser_file(tmp_path_factory.mktemp("tokeniser") / "tokeniser.safetensors", digits, WORDS)


@pytest.fixture(scope="module")
def command(digits, tokeniser):
    """Arguments of a run that predicts words."""
    own = [words for words in arguments(digits) if "decoder" not in words]
    return ["pretrain", "pretrain/beit_demo", *OFF, *own, "model.target=tokens", f"tokeniser.weights={tokeniser}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command, mae_scale):
    """An uninterrupted run on two ranks; its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = mae_scale(*command, "--nproc", 2, "--out", out, "tracking.knn_images=100")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_a_run_learns_measures_and_leaves_weights(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["train/loss"] == pytest.approx(math.log(WORDS), rel=0.05)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.1
    assert rows[-1]["val/loss"] < math.log(WORDS)
    assert 0 < rows[-1]["val/knn_top1"] <= 100
    weights = read_weights(whole / "export" / "model.safetensors")
    assert {"mask_token", "lm_head.weight", "rel_pos_bias.relative_position_bias_table"} <= weights.keys()
    checkpoint = list_checkpoints(whole / "checkpoints")[-1][1]
    model, _ = checkpoint_model(checkpoint)
    assert isinstance(model, Beit)
    assert model.head.out_features == WORDS
    stored = [file.read_bytes() for file in checkpoint.glob("rank_*")]
    assert not any(b"blocks.group_1" in content for content in stored)  # the tokeniser is in no checkpoint
    assert json.loads((checkpoint / "manifest.json").read_text())["tokeniser"]["words"] == WORDS


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [["engine.zero_stage=3", "engine.micro_batch=40"], ["engine.backend=fairscale", "engine.zero_stage=1"]]
)
def test_one_rank_and_another_engine_have_the_same_curve(layout, whole, command, mae_scale, tmp_path):
    done = mae_scale(*command, "--out", tmp_path / "run", *layout)
    assert done.returncode == 0, done.stderr
    expected, found = losses(whole), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5


@pytest.mark.slow
def test_sigkill_leaves_no_trace_in_the_curve(whole, command, tmp_path):
    out = tmp_path / "run"
    start = [*command, "--nproc", 2, "checkpoint.every_steps=4", "tracking.knn_images=100"]
    with Training(out, *start) as training:
        training.wait_until(lambda: list_checkpoints(out / "checkpoints"))
        for rank in training.ranks().values():
            rank.send_signal(signal.SIGKILL)
        assert training.wait() != 0
    with Training(out, *start) as training:
        assert training.wait() == 0, training.text()
        assert "from the beginning" not in training.text()
    assert losses(out) == losses(whole)


@pytest.mark.slow
def test_a_run_is_fine_tuned_at_its_size_and_another_probed_and_exported(whole, digits, mae_scale, tmp_path):
    own = [words for words in arguments(digits) if "decoder" not in words]
    tune = [*own, "data.labels_per_class=null", "optim.layer_decay=0.75", *BEIT, *OFF, "--weights", whole]
    done = mae_scale("finetune", "finetune/demo", "--out", tmp_path / "tuned", *tune, "classifier.ema=0.9")
    assert done.returncode == 0, done.stderr
    assert "relative_position" not in done.stderr
    assert (tmp_path / "tuned" / "figures" / "attention.png").exists()
    larger = mae_scale("finetune", "finetune/demo", "--out", tmp_path / "larger", *tune, "model.image_size=64")
    assert larger.returncode == 0, larger.stderr
    probe = ["classifier.trained_blocks=0", "engine.zero_stage=0"]
    probed = mae_scale("finetune", "finetune/demo", "--out", tmp_path / "probed", *tune, *probe, "optim.layer_decay=1")
    assert probed.returncode == 0, probed.stderr
    for kind in ("hf", "timm"):
        done = mae_scale("export", tmp_path / "tuned", tmp_path / kind, "--format", kind)
        assert done.returncode == 0, done.stderr
    encoder = package.load_encoder(whole)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_tokeniser(whole, digits, command, call, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    other = tokeniser_file(tmp_path / "other.safetensors", digits, WORDS, seed=1)
    overrides = [f"tokeniser.weights={other}", "tracking.knn_images=100"]
    code, _, error = call(*command, "--out", run, *overrides)
    assert (code, error.count("\n")) == (2, 1), error
    assert "is another tokeniser than the run in" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tokeniser=null"], "model.target=tokens needs a tokeniser; add tokeniser.weights=PATH"),
        (["tokeniser.weights=/nowhere"], "tokeniser.weights=/nowhere does not exist"),
        (["model.target=pixels"], "the section tokeniser gives words, and model.target=pixels predicts none"),
        (["model.encoder=vit"], "task: beit does not train model.encoder=vit"),
        (["model.layer_scale=null"], "model.encoder=beit needs model.layer_scale"),
        (["model.target=pca"], "model.target=pca belongs to task: mae"),
        (["model.encoder_mask_tokens=true"], "model.encoder_mask_tokens belongs to task: mae"),
        (["model.patch_size=5"], "image_size 32 px is not a multiple of patch_size 5 px"),
        (["model.masking=grid"], "grid masking cannot remove 0.38 of 4 x 4 patches"),
        (["optim.layer_decay=0.5"], "optim.layer_decay belongs to tasks that start from weights"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, says, command, call, tmp_path):
    code, _, error = call(*command, "--out", tmp_path / "run", *words)
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
    assert not (tmp_path / "run").exists()


def test_a_classifier_says_that_its_encoder_is_beits(call, digits, tmp_path):
    own = [words for words in arguments(digits) if "decoder" not in words]
    for words, says in (
        (["model.encoder=beit"], "model.encoder=beit needs model.layer_scale"),
        (["model.layer_scale=0.1"], "model.layer_scale=0.1 belongs to model.encoder=beit"),
    ):
        code, _, error = call("finetune", "finetune/demo", "--out", tmp_path / "run", *own, *words)
        assert (code, error.count("\n")) == (2, 1), error
        assert says in error
