"""A masked autoencoder of words, killed after a checkpoint: the same start goes on bit for bit, another follows."""

import shutil

import pytest

from tests.faults.harness import kill_after, newest_whole_step
from tests.tiny import STEPS, arguments, losses
from tests.tokenisers import tokeniser_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO_RANKS = ["engine.zero_stage=2", "engine.micro_batch=10", "--nproc", 2]


@pytest.fixture(scope="module")
def command(digits, tmp_path_factory):
    tokeniser = tokeniser_file(tmp_path_factory.mktemp("tokeniser") / "tokeniser.safetensors", digits, words=12)
    target = ["model.target=tokens", f"tokeniser.weights={tokeniser}"]
    return ["pretrain", "demo", "--tracking-uri", "off", *arguments(digits, *target)]


@pytest.fixture(scope="module")
def whole(command, mae_scale, tmp_path_factory):
    out = tmp_path_factory.mktemp("words") / "whole"
    done = mae_scale(*command, *TWO_RANKS, "--out", out)
    assert done.returncode == 0, done.stderr
    return losses(out)


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """A run of two ranks that was killed after a checkpoint; its folder."""
    out = tmp_path_factory.mktemp("words") / "killed"
    kill_after(out, 6, *command, *TWO_RANKS, "checkpoint.every_steps=2")
    assert newest_whole_step(out) < STEPS
    return out


def resumed(killed, out, mae_scale, words) -> dict[int, float]:
    """The losses of a copy of the killed run, gone on with."""
    shutil.copytree(killed, out)
    done = mae_scale(*words, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    return losses(out)


def test_the_same_start_goes_on_bit_for_bit(command, killed, whole, mae_scale, tmp_path):
    assert resumed(killed, tmp_path / "run", mae_scale, [*command, *TWO_RANKS]) == whole


def test_one_rank_under_fairscale_follows(command, killed, whole, mae_scale, tmp_path):
    other = ["engine.backend=fairscale", "engine.zero_stage=1"]
    assert resumed(killed, tmp_path / "run", mae_scale, [*command, *other]) == pytest.approx(whole, abs=1e-5)
