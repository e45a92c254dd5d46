"""A masked autoencoder that predicts the words of a tokeniser: on any ranks, resumed, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from mae_scale.checkpoints.export import checkpoint_model, find_checkpoint
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.tokeniser import Tokeniser, TokeniserSize
from tests.tiny import STEPS, arguments, losses

WORDS = 12
TARGET = "model.target=tokens"


def tokeniser_file(folder, seed=0):
    torch.manual_seed(seed)
    path = folder / f"tokeniser{seed}.safetensors"
    save_file(Tokeniser(TokeniserSize(width=8, words=WORDS, blocks_per_group=1)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory):
    return tokeniser_file(tmp_path_factory.mktemp("tokeniser"))


def words(digits, tokeniser, *more):
    return [*arguments(digits, TARGET, f"tokeniser.weights={tokeniser}", "tracking.uri=off"), *more]


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
    assert curve[1] == pytest.approx(torch.tensor(float(WORDS)).log().item(), abs=0.5)  # it begins by guessing
    assert curve[STEPS] < curve[1] - 0.2
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
    done = mae_scale("pretrain", "demo", "--out", out, *words(digits, tokeniser_file(tmp_path, seed=1)))
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
