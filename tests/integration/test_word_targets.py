"""A masked autoencoder that predicts the words of a tokeniser: on any ranks, resumed, and what is refused."""

import math

import pytest
import torch

from data_pipeline.batch_order import TrainingOrder
from data_pipeline.index import load_index
from data_pipeline.loader import ImageLoader
from mae_scale import load_tokeniser
from mae_scale.checkpoints.export import checkpoint_model, find_checkpoint
from mae_scale.config.load import load_recipe
from mae_scale.engines.policy import layout_of
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.tokeniser import from_normalised
from mae_scale.tasks.registry import task_of
from tests.loaders import on_cpu
from tests.tiny import STEPS, arguments, losses
from tests.tokenisers import tokeniser_file

WORDS = 12
TARGET = "model.target=tokens"


@pytest.fixture(scope="module")
def tokeniser(digits, tmp_path_factory):
    return tokeniser_file(tmp_path_factory.mktemp("tokeniser") / "tokeniser.safetensors", digits, WORDS)


def words(digits, tokeniser, *more):
    return [
        *arguments(digits, TARGET, f"tokeniser.weights={tokeniser}", "optim.base_lr=8e-3", "tracking.uri=off"),
        *more,
    ]


@pytest.fixture(scope="module")
def whole(digits, tokeniser, mae_scale, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = mae_scale("pretrain", "demo", "--out", out, *words(digits, tokeniser))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_it_learns_and_leaves_weights_that_fine_tuning_takes(whole, digits, mae_scale, tmp_path):
    curve = losses(whole)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < math.log(WORDS) - 0.3  # better than guessing
    model, _ = checkpoint_model(find_checkpoint(whole))
    assert isinstance(model, MaskedAutoencoder)
    assert model.head.out_features == WORDS
    short = arguments(digits, "data.labels_per_class=null", "schedule.epochs=1", "schedule.warmup_epochs=0")
    sizes = [word for word in short if "decoder" not in word]
    for weights in (whole, whole / "export" / "model.safetensors"):
        out = tmp_path / weights.name
        done = mae_scale("finetune", "finetune/demo", "--weights", weights, "--out", out, *sizes, "tracking.uri=off")
        assert done.returncode == 0, done.stderr
    done = mae_scale("reconstruct", "demo", "--weights", whole, "--out", tmp_path / "x.png", *arguments(digits))
    assert done.returncode == 2
    assert "predict the words of a tokeniser, and no pixels" in done.stderr


@pytest.mark.slow
def test_its_first_loss_is_that_of_the_words_of_the_very_patches_and_images(whole, tokeniser):
    recipe, index = load_recipe(str(whole / "recipe.yaml")), load_index(whole / "index.npz")
    torch.manual_seed(recipe.seed)
    objective = task_of(recipe, whole).build(index)
    order = TrainingOrder(layout_of(recipe, 1), seed=recipe.seed, stop_step=1)
    with ImageLoader(index, order, on_cpu(recipe.model.image_size), draw=objective.draw) as loader:
        (batch,) = loader
    # Four patches a side: the tokeniser's view of 8 px for each is the image as it is.
    found = load_tokeniser(tokeniser).tokens(from_normalised(batch.images))
    own, of_next_patch, of_next_image = (
        objective.model(batch.images, *batch.drawn, None, targets).loss.item()
        for targets in (found, found.roll(1, dims=1), found.roll(1, dims=0))
    )
    assert losses(whole)[1] == pytest.approx(own, abs=1e-3)
    assert min(abs(own - of_next_patch), abs(own - of_next_image)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["engine.zero_stage=1", "engine.micro_batch=20"], ["engine.zero_stage=3"]])
def test_two_ranks_have_the_losses_of_one(engine, whole, digits, tokeniser, mae_scale, tmp_path):
    out = tmp_path / "run"
    done = mae_scale("pretrain", "demo", "--out", out, "--nproc", 2, *words(digits, tokeniser, *engine))
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_its_tokeniser_wherever_that_lies_and_with_no_other(
    whole, digits, tokeniser, mae_scale, tmp_path
):
    out, moved = tmp_path / "run", tmp_path / "moved.safetensors"
    moved.write_bytes(tokeniser.read_bytes())
    assert (
        mae_scale("pretrain", "demo", "--out", out, *words(digits, tokeniser, "schedule.stop_after_steps=7")).returncode
        == 0
    )
    other = tokeniser_file(tmp_path / "other.safetensors", digits, WORDS, seed=1)
    done = mae_scale("pretrain", "demo", "--out", out, *words(digits, other))
    assert done.returncode == 2
    assert "is another tokeniser than the run in" in done.stderr
    done = mae_scale("pretrain", "demo", "--out", out, *words(digits, moved))
    assert done.returncode == 0, done.stderr
    assert "going on from step 7" in done.stdout
    assert losses(out) == losses(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([TARGET], "model.target=tokens needs a tokeniser; add tokeniser.weights=PATH"),
        ([TARGET, "tokeniser.weights=nowhere"], "tokeniser.weights=nowhere does not exist"),
        (["tokeniser.weights=nowhere"], "the section tokeniser gives words, and model.target=normalised_pixels"),
    ],
)
def test_words_without_a_tokeniser_and_a_tokeniser_without_words_are_refused(more, said, call, digits, tmp_path):
    code, _, stderr = call("pretrain", "demo", "--out", tmp_path / "run", *arguments(digits, *more))
    assert (code, stderr.count("\n")) == (2, 1)
    assert said in stderr
    assert not (tmp_path / "run").exists()
