"""A tokeniser as a user trains it: on any ranks, micro-batches and engines, stopped and resumed, then used."""

import math
import shutil

import pytest
import torch

import mae_scale as package
from mae_scale.models.weights.tokeniser import tokeniser_digest
from mae_scale.tracking.metrics_log import read_metrics
from tests.faults.harness import kill_after, newest_whole_step
from tests.tiny import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TINY = [
    "model.image_size=16",
    "tokeniser.width=8",
    "tokeniser.words=16",
    "data.global_batch=120",
    "optim.base_lr=2e-2",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "tracking.log_every_steps=1",
    "tracking.uri=off",
]
STEPS = 12


@pytest.fixture(scope="module")
def command(digits):
    """Arguments of the tiny tokeniser's training."""
    return ["pretrain", "pretrain/dvae_demo", f"data.root={digits}/train", f"data.val_root={digits}/val", *TINY]


@pytest.fixture(scope="module")
def train(command, mae_scale):
    """Train the tiny tokeniser in a folder; what it printed."""

    def run(out, *words, nproc=1):
        done = mae_scale(*command, "--out", out, "--nproc", nproc, *words)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    out = tmp_path_factory.mktemp("dvae") / "run"
    train(out)
    return out


def test_a_run_learns_measures_its_words_and_leaves_its_tokeniser(whole):
    curve, last = losses(whole), read_metrics(whole / "metrics.jsonl")[-1]
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 0.1
    assert 0 < last["val/mse"] < 0.13  # variance of the pixels
    assert 1 / 16 <= last["val/words_used"] <= 1
    assert 1 <= last["val/perplexity"] <= 16 * last["val/words_used"]
    assert math.isfinite(last["val/loss"])
    assert (whole / "figures" / "reconstructions.png").exists()
    state = torch.get_rng_state()
    found, file = package.load_tokeniser(whole), package.load_tokeniser(whole / "export" / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)  # a model that is built next is the same without it
    assert tokeniser_digest(found) == tokeniser_digest(file)
    assert (found.size.width, found.size.words, found.size.blocks_per_group) == (8, 16, 1)
    assert found.tokens(torch.rand(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("nproc", "words"),
    [
        (1, ["engine.zero_stage=0", "engine.micro_batch=30"]),
        (2, ["engine.zero_stage=1"]),
        (2, ["engine.zero_stage=2", "engine.micro_batch=30", "engine.activation_checkpointing=all"]),
        (2, ["engine.zero_stage=3", "engine.micro_batch=30"]),
        (2, ["engine.backend=fairscale", "engine.zero_stage=1"]),
    ],
)
def test_the_curve_is_the_same_on_any_ranks_micro_batches_and_engines(nproc, words, train, whole, tmp_path):
    """Convolutions of another batch are rounded otherwise on some CPUs, which later steps make larger, and of two words
    that are as likely the other may be taken in validation."""
    train(tmp_path / "run", *words, nproc=nproc)
    found, expected = losses(tmp_path / "run"), losses(whole)
    assert found == pytest.approx(expected, abs=1e-4)
    assert [found[step] for step in range(1, 9)] == pytest.approx([expected[step] for step in range(1, 9)], abs=2e-5)
    last, of_whole = (read_metrics(out / "metrics.jsonl")[-1] for out in (tmp_path / "run", whole))
    assert last["val/loss"] == pytest.approx(of_whole["val/loss"], rel=0.1)


def test_bf16_follows_float32(train, whole, tmp_path):
    train(tmp_path / "run", "engine.precision=bf16", "engine.zero_stage=2", nproc=2)
    difference = max(abs(a - b) for a, b in zip(losses(tmp_path / "run").values(), losses(whole).values(), strict=True))
    assert 0 < difference < 0.1


def test_a_stopped_run_goes_on_bit_for_bit(train, whole, tmp_path):
    """The temperature and the weight of the divergence go on where they were, too."""
    train(tmp_path / "run", "schedule.stop_after_steps=5")
    done = train(tmp_path / "run")
    assert "going on from step 5" in done.stdout
    assert losses(tmp_path / "run") == losses(whole)


TWO_RANKS = ["engine.zero_stage=2", "engine.micro_batch=6"]


@pytest.fixture(scope="module")
def whole_on_two_ranks(train, tmp_path_factory):
    out = tmp_path_factory.mktemp("dvae") / "two"
    train(out, *TWO_RANKS, nproc=2)
    return out


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """A run of two ranks that was killed after a checkpoint; its folder."""
    out = tmp_path_factory.mktemp("dvae") / "killed"
    kill_after(out, 4, *command, *TWO_RANKS, "checkpoint.every_steps=2", "--nproc", 2)
    assert newest_whole_step(out) < STEPS
    return out


def test_sigkill_leaves_no_trace_in_the_curve(train, killed, whole_on_two_ranks, tmp_path):
    out = shutil.copytree(killed, tmp_path / "run")
    done = train(out, *TWO_RANKS, nproc=2)
    assert "going on from step" in done.stdout
    assert losses(out) == losses(whole_on_two_ranks)
    found, expected = (package.load_tokeniser(folder) for folder in (out, whole_on_two_ranks))
    assert tokeniser_digest(found) == tokeniser_digest(expected)


def test_after_sigkill_one_rank_under_fairscale_has_the_same_curve(train, killed, whole_on_two_ranks, tmp_path):
    out = shutil.copytree(killed, tmp_path / "run")
    done = train(out, "engine.backend=fairscale", "engine.zero_stage=1", "engine.micro_batch=60")
    assert "going on from step" in done.stdout
    assert losses(out) == pytest.approx(losses(whole_on_two_ranks), abs=2e-5)


def test_its_checkpoint_is_no_encoder_to_export_or_start_from(whole, digits, mae_scale, tmp_path):
    for words in (
        ["export", whole, tmp_path / "m.safetensors"],
        ["finetune", "finetune/demo", "--weights", whole, "--out", tmp_path / "x", f"data.root={digits}/train"],
    ):
        done = mae_scale(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "the run is of task dvae, which trains a tokeniser" in done.stderr
