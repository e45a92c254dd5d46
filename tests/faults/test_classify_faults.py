"""What happens to fine-tuning, partial fine-tuning and probing of two ranks: killed, stopped, their files damaged."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mae_scale.checkpoints.export import checkpoint_model, export_weights, find_checkpoint
from mae_scale.checkpoints.store import FROZEN
from mae_scale.tracking.metrics_log import read_metrics
from tests.faults.harness import Training, newest_whole_step
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(900)

TINY = [
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "data.global_batch=24",
    "data.labels_per_class=10",
    "schedule.warmup_epochs=1",
    "tracking.log_every_steps=1",
    "checkpoint.every_steps=4",
]
STEPS_PER_EPOCH = 100 // 24
AUGMENTED = [
    "optim.base_lr=5e-3",
    "data.augmentation=rand_augment",
    "data.random_erasing=0.25",
    "classifier.mixup=0.8",
    "classifier.cutmix=1.0",
    "model.drop_path=0.2",
    "engine.micro_batch=2",  # slow enough to be killed in the middle
]
EPOCHS = {"finetune": 7, "probe": 25, "partial": 7}
TOLERANCE = {"finetune": 1e-6, "probe": 1e-5}  # BatchNorm over the small differences of hardly trained features
KINDS = {
    "finetune": ["finetune", "finetune/demo", *AUGMENTED, "classifier.ema=0.9", "tracking.evaluate_every_epochs=2"],
    "probe": ["probe", "probe/demo", "optim.base_lr=20", "tracking.evaluate_every_epochs=10"],
    "partial": ["finetune", "partial/demo", *AUGMENTED, "engine.zero_stage=2"],
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, digits) -> Path:
    """The folder of a tiny pre-training run."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    recipe = arguments(digits, "schedule.stop_after_steps=3")
    with Training(out, "pretrain", "demo", "--tracking-uri", "off", *recipe) as training:
        assert training.wait() == 0, training.text()
    return out


@pytest.fixture(scope="module")
def weights(pretrained) -> Path:
    """The same weights as a file."""
    model, _ = checkpoint_model(find_checkpoint(pretrained))
    export_weights(model, pretrained.parent / "weights.safetensors", "official")
    return pretrained.parent / "weights.safetensors"


@pytest.fixture(scope="module")
def start(digits, pretrained, weights):
    """Start a kind of training, by the same command each time but for the number of ranks."""

    def run(kind: str, out: Path, *more: str, nproc: int = 2, whence: Path | None = None) -> Training:
        command, recipe, *overrides = KINDS[kind]
        whence = whence or (weights if kind == "partial" else pretrained)
        data = [f"data.root={digits}/train", f"data.val_root={digits}/val", f"schedule.epochs={EPOCHS[kind]}"]
        options = ["--weights", whence, "--nproc", nproc, "--tracking-uri", "off"]
        return Training(out, command, recipe, *options, *TINY, *data, *overrides, *more)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    """The folder of a kind's uninterrupted run."""
    done = {}

    def run(kind: str) -> Path:
        if kind not in done:
            out = tmp_path_factory.mktemp(f"whole_{kind}") / "run"
            with start(kind, out) as training:
                assert training.wait() == 0, training.text()
            assert list(losses(out)) == list(range(1, EPOCHS[kind] * STEPS_PER_EPOCH + 1))
            done[kind] = out
        return done[kind]

    return run


@pytest.fixture(scope="module", params=["finetune", pytest.param("probe", marks=pytest.mark.slow)])
def killed(request, tmp_path_factory, start):
    """A kind, and the folder of its run that was killed in the middle, after a checkpoint."""
    out = tmp_path_factory.mktemp(f"killed_{request.param}") / "run"
    with start(request.param, out) as training:
        training.wait_until(lambda: newest_whole_step(out) >= 8)
        training.kill_all()
    assert 8 <= newest_whole_step(out) < EPOCHS[request.param] * STEPS_PER_EPOCH
    assert not (out / "export").exists()
    return request.param, out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, start):
    """The folder of a partial fine-tuning that SIGTERM to one rank has stopped."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with start("partial", out) as training:
        training.wait_until(lambda: newest_whole_step(out) >= 8)
        training.ranks()[1].send_signal(signal.SIGTERM)
        assert training.wait(60) == 75, training.text()
        assert training.left_behind() == []
    assert newest_whole_step(out) == list(losses(out))[-1] < EPOCHS["partial"] * STEPS_PER_EPOCH
    return out


@pytest.fixture
def copied(tmp_path):
    """A copy of a run's folder."""
    return lambda run: shutil.copytree(run, tmp_path / "run")


def top1(out: Path) -> float:
    return json.loads((out / "evaluation.json").read_text())["top1"]


def evaluations(out: Path) -> dict[int, tuple[float, float]]:
    return {
        row["step"]: (row["val/top1"], row["val/loss"])
        for row in read_metrics(out / "metrics.jsonl")
        if "val/top1" in row
    }


def goes_on(training: Training, out: Path) -> None:
    """It ends well, from where its folder stood."""
    step = newest_whole_step(out)
    with training:
        assert training.wait() == 0, training.text()
    assert f"going on from step {step}\n" in training.text()


def is_refused(training: Training, code: int, *said: str) -> None:
    """It ends with one clear error."""
    with training:
        assert training.wait(120) == code, training.text()
    assert training.text().count("error: ") == 1, training.text()
    assert "Traceback" not in training.text()
    for words in said:
        assert words in " ".join(training.text().split())


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_sigkill_leaves_no_trace_in_curve_and_accuracy(killed, start, whole, copied):
    kind, folder = killed
    out = copied(folder)
    goes_on(start(kind, out), out)
    assert losses(out) == losses(whole(kind))
    assert evaluations(out) == evaluations(whole(kind))
    assert top1(out) == top1(whole(kind))


@pytest.mark.slow
def test_after_sigkill_one_rank_follows_the_uninterrupted_run(killed, start, whole, copied):
    """A rank's micro-batch stays what it was, so there are twice as many."""
    kind, folder = killed
    out = copied(folder)
    goes_on(start(kind, out, nproc=1), out)
    mine, theirs = losses(out), losses(whole(kind))
    assert mine.keys() == theirs.keys()
    assert max(abs(mine[step] - theirs[step]) for step in theirs) < TOLERANCE[kind]
    assert top1(out) == top1(whole(kind))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_after_sigterm_frozen_weights_are_those_of_the_start_also_when_their_file_is_lost(
    lost, stopped, start, whole, copied
):
    out = copied(stopped)
    if lost:
        (out / FROZEN).unlink()
    goes_on(start("partial", out), out)
    assert (out / FROZEN).read_bytes() == (stopped / FROZEN).read_bytes()
    assert losses(out) == losses(whole("partial"))
    assert top1(out) == top1(whole("partial"))


@pytest.mark.parametrize(("position", "code"), [(-100, 2), (9, 1)], ids=["in a weight", "in the header"])
def test_damaged_frozen_weights_are_one_clear_error(position, code, stopped, start, copied):
    out = copied(stopped)
    flip(out / FROZEN, position)
    is_refused(start("partial", out), code, FROZEN, str(out))
    assert losses(out) == losses(stopped)


def test_lost_frozen_weights_are_not_replaced_by_others(stopped, start, copied, digits, weights, tmp_path):
    """Neither from another file, nor from a run's folder that has moved on since."""
    out, other = copied(stopped), tmp_path / "other.safetensors"
    (out / FROZEN).unlink()
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, other)
    is_refused(start("partial", out, whence=other), 2, f"classifier.weights={other} (--weights) are other weights")
    moved_on = tmp_path / "moved_on"
    recipe = arguments(digits, "schedule.stop_after_steps=1", "seed=5")
    with Training(moved_on, "pretrain", "demo", "--tracking-uri", "off", *recipe) as training:
        assert training.wait() == 0, training.text()
    is_refused(
        start("partial", out, whence=moved_on), 2, FROZEN, "are not those that its checkpoints were written with"
    )


def test_lost_frozen_weights_are_asked_for(stopped, start, copied, tmp_path):
    out = copied(stopped)
    (out / FROZEN).unlink()
    is_refused(start("partial", out, whence=tmp_path / "gone"), 2, FROZEN, "is lost", "--weights PATH")


@pytest.mark.slow
def test_frozen_weights_of_a_start_without_a_checkpoint_are_written_anew(stopped, start, whole, copied):
    """The file that --weights names may have become another since."""
    out = copied(stopped)
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.jsonl").unlink()
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(out / FROZEN).items()}, out / FROZEN)
    with start("partial", out, "schedule.stop_after_steps=4") as training:
        assert training.wait() == 0, training.text()
    assert losses(out) == {step: loss for step, loss in losses(whole("partial")).items() if step <= 4}
