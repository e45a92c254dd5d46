"""Every method without a published file, in a few steps: a tokeniser, its words, BEiT and MAE on them, MoCo v3."""

import math

import pytest

from mae_scale import load_tokeniser
from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import losses
from tests.tokenisers import largest_share, pixels_of

STEPS, BATCH, WORDS = 4, 120, 16
SIZE = [f"model.{key}" for key in ("name=null", "image_size=32", "patch_size=8", "width=32", "depth=2", "heads=2")]
DECODER = [f"model.decoder_{key}" for key in ("width=16", "depth=1", "heads=2")]
SCHEDULE = ["schedule.epochs=2", "schedule.warmup_epochs=0", "tracking.log_every_steps=1", "tracking.uri=off"]


@pytest.fixture(scope="module")
def train(digits, mae_scale, tmp_path_factory):
    """Pre-train for STEPS steps on the digits' validation images, by default stopped before the last; the folder."""

    def run(recipe, *words, stop=True):
        out = tmp_path_factory.mktemp("runs") / "run"
        data = [f"data.root={digits}/val", f"data.val_root={digits}/val", f"data.global_batch={BATCH}"]
        command = ["pretrain", recipe, "--out", out, *data, *SCHEDULE, *words]
        if stop:
            done = mae_scale(*command, f"schedule.stop_after_steps={STEPS - 1}")
            assert done.returncode == 0, done.stderr
        done = mae_scale(*command)
        assert done.returncode == 0, done.stderr
        assert (f"going on from step {STEPS - 1}" in done.stdout) == stop
        assert list(losses(out)) == list(range(1, STEPS + 1))
        assert (out / "export" / "model.safetensors").exists()
        return out

    return run


@pytest.fixture(scope="module")
def tokeniser(train):
    return train("pretrain/dvae_demo", "model.image_size=32", "tokeniser.width=8", f"tokeniser.words={WORDS}")


@pytest.fixture(scope="module")
def words(tokeniser, digits, mae_scale, tmp_path_factory):
    """The words of the training images."""
    out = tmp_path_factory.mktemp("words") / "words"
    given = ["--tokeniser", tokeniser, "--out", out, f"data.root={digits}/val"]
    done = mae_scale("tokens", "pretrain/beit_demo", *SIZE, *given)
    assert done.returncode == 0, done.stderr
    return out


def predict(tokeniser):
    """Arguments of a training that predicts words."""
    return [*SIZE, "model.target=tokens", f"tokeniser.weights={tokeniser}", "data.augmentation=none"]


@pytest.fixture(scope="module")
def beit(train, tokeniser):
    """BEiT that finds the words as it trains, uninterrupted."""
    return train("pretrain/beit_demo", *predict(tokeniser), stop=False)


def test_a_tokeniser_learns_and_has_several_words(tokeniser, digits):
    assert losses(tokeniser)[STEPS] < losses(tokeniser)[1]
    assert largest_share(load_tokeniser(tokeniser).tokens(pixels_of(digits))) < 0.8


def test_beit_that_is_resumed_on_stored_words_has_the_losses_of_one_that_finds_them(beit, train, tokeniser, words):
    stored = train("pretrain/beit_demo", *predict(tokeniser), f"tokeniser.tokens={words}")
    assert losses(stored) == losses(beit)
    assert losses(beit)[1] == pytest.approx(math.log(WORDS), rel=0.1)
    last, expected = (read_metrics(out / "metrics.jsonl")[-1] for out in (stored, beit))
    assert last["val/loss"] == expected["val/loss"]


def test_a_run_of_beit_is_no_tokeniser(beit, digits, call, tmp_path):
    data = [f"data.root={digits}/val", f"data.global_batch={BATCH}", *SCHEDULE]
    code, _, error = call("pretrain", "pretrain/beit_demo", "--out", tmp_path / "run", *data, *predict(beit))
    assert (code, error.count("\n")) == (2, 1), error
    assert f"{beit} is of a run of task beit, which trains no tokeniser; give one of task dvae" in error


def test_mae_learns_to_predict_words(train, tokeniser, words):
    given = [*predict(tokeniser), f"tokeniser.tokens={words}", "optim.base_lr=2e-2"]
    curve = losses(train("demo", *DECODER, *given))
    assert curve[STEPS] < math.log(WORDS) < curve[1]


def test_moco_contrasts_two_views(train):
    out = train("pretrain/moco_v3_vit_base", *SIZE, "moco.hidden=64", "moco.dim=32", "engine.precision=null")
    assert losses(out)[1] == pytest.approx(4 * 0.2 * math.log(BATCH), rel=0.1)
