"""The guides in docs/extend: what they show, put into a copy of the project, trains as everything here does.

Each example of docs/examples is a folder laid out as the project, and `changes.patch` for the files that it changes;
the guides show these very files.
"""

import functools
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.tiny import arguments, losses

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PROJECT = ("mae_scale", "data_pipeline", "ds_configs", "slurm")
WORDS = {
    "task": ["rotation.yaml"],
    "augmentation": ["demo", "data.augmentation=posterise"],
    "engine": ["demo", "engine.backend=ddp", "engine.zero_stage=0"],
}
SHORT = ["schedule.epochs=1", "schedule.warmup_epochs=0", "tracking.uri=off"]
STEPS, MIDDLE = 12, 5


class Copy:
    """A copy of the project with an example in it."""

    def __init__(self, name: str, folder: Path, digits: Path):
        self.words, self.folder, self._digits = WORDS[name], folder, digits
        for part in PROJECT:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / ".importlinter", folder)
        shutil.copytree(EXAMPLES / name, folder, dirs_exist_ok=True)
        self.call(["git", "apply", "changes.patch"], GIT_CEILING_DIRECTORIES=str(folder.parent))

    def call(self, command: list[str], **environment: str) -> str:
        """Run a command in the copy, as a user who works there does; return what it prints."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "COLUMNS": "120", **environment}
        done = warm.run(command, cwd=self.folder, env=environment, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, out: str, *overrides: str, nproc: int = 1) -> str:
        words = [*self.words, *arguments(self._digits, *SHORT, *overrides), "--out", out, "--nproc", str(nproc)]
        return self.call([sys.executable, "-m", "mae_scale", "pretrain", *words])

    @functools.cached_property
    def whole(self) -> dict[int, float]:
        """The losses of an uninterrupted run."""
        self.start("whole")
        found = losses(self.folder / "whole")
        assert list(found) == list(range(1, STEPS + 1))
        return found


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory, digits):
    """A copy of the project with the example of a name, made once."""
    made: dict[str, Copy] = {}

    def copy(name: str) -> Copy:
        if name not in made:
            made[name] = Copy(name, tmp_path_factory.mktemp(name), digits)
        return made[name]

    return copy


@pytest.mark.parametrize("name", WORDS)
def test_an_example_keeps_to_the_layers(name, copy_of):
    program = str(Path(sys.executable).with_name("lint-imports"))
    assert "Contracts: 4 kept, 0 broken." in copy_of(name).call([program, "--no-logo", "--no-cache"])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_an_example_stops_early_and_goes_on_bit_for_bit(name, copy_of):
    copy = copy_of(name)
    copy.start("run", f"schedule.stop_after_steps={MIDDLE}")
    assert f"going on from step {MIDDLE}" in copy.start("run")
    assert losses(copy.folder / "run") == copy.whole


@pytest.mark.parametrize("name", WORDS)
def test_an_example_stops_early_and_goes_on_with_two_ranks_to_the_losses_of_an_uninterrupted_run(name, copy_of):
    copy = copy_of(name)
    copy.start("two ranks", f"schedule.stop_after_steps={MIDDLE}")
    assert f"going on from step {MIDDLE}" in copy.start("two ranks", nproc=2)
    assert losses(copy.folder / "two ranks") == pytest.approx(copy.whole, abs=1e-6)


def test_the_task_learns_and_leaves_weights_that_fine_tuning_takes(copy_of, digits, mae_scale, tmp_path):
    copy = copy_of("task")
    curve = copy.whole
    assert curve[1] == pytest.approx(math.log(4), abs=0.2)  # it begins by guessing
    assert curve[STEPS] < curve[1]
    weights = copy.folder / "whole" / "export" / "encoder.safetensors"
    sizes = [word for word in arguments(digits, *SHORT) if not word.startswith("model.decoder")]
    words = ["finetune", "finetune/demo", "--weights", weights, "--out", tmp_path / "run", "data.labels_per_class=null"]
    done = mae_scale(*words, *sizes)
    assert done.returncode == 0, done.stderr
    assert f"tensors from {weights}; fresh: fc_norm (2), head (2); unused: norm (2)\n" in done.stdout


def test_the_augmentation_changes_the_images_and_the_engine_does_not_change_the_curve(
    copy_of, digits, mae_scale, tmp_path
):
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "run", *arguments(digits, *SHORT))
    assert done.returncode == 0, done.stderr
    plain = losses(tmp_path / "run")
    assert copy_of("engine").whole == pytest.approx(plain, abs=1e-6)
    assert copy_of("augmentation").whole != pytest.approx(plain, abs=1e-3)
