"""A run whose images and weights lie elsewhere at its next start, as a requeued job's on scratch disks."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import load_index
from mae_scale.checkpoints.shards import digest_of
from mae_scale.checkpoints.store import read_manifest, write_manifest
from mae_scale.config.load import load_recipe
from mae_scale.tasks.registry import task_of
from mae_scale.training.preflight import check, check_images, prepare
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(600)

STEPS, KILLED_AFTER = 4, 2
# An engine that starts quickly; which one reads the images plays no part here.
QUICK = [
    "engine.backend=fairscale",
    "engine.zero_stage=1",
    "checkpoint.every_steps=2",
    f"schedule.stop_after_steps={STEPS}",
]
FEW = ["data.global_batch=24", "data.labels_per_class=10"]
COMMANDS = {"pretrain": ["pretrain", "demo"], "finetune": ["finetune", "partial/demo", *FEW]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory, digits, mae_scale) -> Path:
    """A file of weights for the tiny encoder."""
    root = tmp_path_factory.mktemp("weights")
    short = ["schedule.stop_after_steps=1", *QUICK[:2]]
    done = mae_scale("pretrain", "demo", "--out", root / "r", "--tracking-uri", "off", *arguments(digits, *short))
    assert done.returncode == 0, done.stderr
    assert mae_scale("export", root / "r", root / "weights.safetensors").returncode == 0
    return root / "weights.safetensors"


def words_of(kind: str, out: Path, data: Path, *more: object) -> list[object]:
    """The command of a kind of training on the images below a folder."""
    command, recipe, *overrides = COMMANDS[kind]
    model = [word for word in arguments(data, *QUICK) if "decoder" not in word or kind == "pretrain"]
    return [command, recipe, "--out", out, "--tracking-uri", "off", *model, *overrides, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits, mae_scale, weights):
    """The folder of a kind's uninterrupted run; its data and weights lay where nothing lies any more."""
    done = {}

    def run(kind: str, nproc: int) -> Path:
        if (kind, nproc) not in done:
            root = tmp_path_factory.mktemp(f"{kind}_{nproc}")
            shutil.copytree(digits, root / "job_1" / "digits")
            shutil.copy(weights, root / "job_1")
            given = ["--weights", root / "job_1" / weights.name] if kind == "finetune" else []
            ended = mae_scale(*words_of(kind, root / "r", root / "job_1" / "digits", "--nproc", nproc, *given))
            assert ended.returncode == 0, ended.stderr
            shutil.rmtree(root / "job_1")
            done[kind, nproc] = root / "r"
        return done[kind, nproc]

    return run


@pytest.fixture
def killed(whole, tmp_path):
    """A copy of a run's folder as if it had been killed on its way to the last step."""

    def copy(kind: str, nproc: int = 2) -> Path:
        out = shutil.copytree(whole(kind, nproc), tmp_path / "r")
        shutil.rmtree(out / "checkpoints" / f"step_{STEPS:08d}")
        return out

    return copy


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_goes_on_bit_for_bit_with_its_images_elsewhere_and_its_weights_gone(
    kind, nproc, whole, killed, digits, mae_scale, tmp_path
):
    out, elsewhere = killed(kind, nproc), tmp_path / "job_2"
    shutil.copytree(digits, elsewhere / "digits", ignore=shutil.ignore_patterns(".*"))  # with other times
    for image in (elsewhere / "digits").rglob("*.jpg"):
        os.utime(image)
    done = mae_scale(*words_of(kind, out, elsewhere / "digits", "--nproc", nproc))
    assert done.returncode == 0, done.stderr
    assert f"going on from step {KILLED_AFTER}\n" in done.stdout
    assert list(losses(out)) == list(range(1, STEPS + 1))
    assert losses(out) == losses(whole(kind, nproc))
    before, after = (read_manifest(run / "checkpoints" / f"step_{STEPS:08d}") for run in (whole(kind, nproc), out))
    assert after["index"] == before["index"]
    assert (after.get("started_from"), after["recipe_digest"]) == (before.get("started_from"), before["recipe_digest"])


def test_one_folder_may_be_written_in_any_way(killed, digits, monkeypatch, tmp_path):
    """Relative, absolute or through a symbolic link: the folder is compared once, when it has moved."""
    out = killed("pretrain")
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "link").symlink_to(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    for root in ("digits", "./digits", tmp_path / "digits", "link"):
        recipe = load_recipe("demo", words_of("pretrain", out, Path(root))[6:])
        task = task_of(recipe, out)
        check(task, 2)
        prepare(task)
    assert "link" in (out / "recipe.yaml").read_text()
    assert all(images.is_kept for images in check_images(task).values())


def other_images(root: Path) -> Path:
    """Other images than the digits, in the same classes."""
    for number in range(200):
        folder = root / "train" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg")
    shutil.copytree(root / "train", root / "val")
    return root


def one_more(root: Path) -> None:
    shutil.copy(next((root / "train" / "3").glob("*.jpg")), root / "train" / "3" / "more.jpg")


def a_class_more(root: Path) -> None:
    shutil.copytree(root / "train" / "3", root / "train" / "zebra")


def renamed(root: Path, place: str = "train/3") -> None:
    image = sorted((root / place).glob("*.jpg"))[0]
    image.rename(image.with_name("another.jpg"))


CHANGES = {
    "an image more": (one_more, "data.root", "1 differ"),
    "a class more": (a_class_more, "data.root", "zebra/"),
    "an image with another name": (renamed, "data.root", "2 differ from its 1,442, such as 3/"),
    "a validation image with another name": (lambda root: renamed(root, "val/3"), "data.val_root", "from its 355"),
    "nothing there": (lambda root: shutil.rmtree(root / "train"), "data.root", "does not exist"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_refused_in_one_line_and_nothing_is_changed(change, killed, digits, call, tmp_path):
    out = killed("pretrain")
    alter, key, said = CHANGES[change]
    alter(shutil.copytree(digits, tmp_path / "digits"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, error = call(*words_of("pretrain", out, tmp_path / "digits", "--nproc", 2))
    assert (code, error.count("\n")) == (2, 1), error
    assert f"{key}={tmp_path}/digits/" in error
    assert said in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_images_in_the_place_of_the_runs_own_are_refused(digits, mae_scale, call, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    words = words_of("pretrain", tmp_path / "r", tmp_path / "digits")
    assert mae_scale(*words, "schedule.stop_after_steps=1").returncode == 0
    words += ["--nproc", 2]
    shutil.rmtree(tmp_path / "digits")
    other_images(tmp_path / "digits")
    code, _, error = call(*words)
    assert (code, error.count("\n")) == (2, 1), error
    assert f"data.root={tmp_path}/digits/train no longer holds the images of this run" in error


@pytest.mark.parametrize(("kind", "nproc"), [("pretrain", 2), ("finetune", 1)])
def test_an_image_that_has_turned_bad_in_a_copy_is_no_other_image(kind, nproc, killed, digits, tmp_path):
    """It is replaced and counted when its turn comes, as one that turns bad where it lies."""
    out = killed(kind, nproc)
    kept = load_index(out / "index.npz")
    shutil.copytree(digits, tmp_path / "digits")
    image = tmp_path / "digits" / "train" / kept.name(0)
    image.write_bytes(image.read_bytes()[:100])
    _, name, *words = words_of(kind, out, tmp_path / "digits")
    recipe = load_recipe(name, words[4:])
    task = task_of(recipe, out)
    check(task, nproc)
    assert check_images(task)["index.npz"].index.digest() == kept.digest()


def test_a_file_of_other_weights_is_refused_and_none_is_needed(killed, digits, weights, call, tmp_path):
    out = killed("finetune", 2)
    (tmp_path / "other.safetensors").write_bytes(weights.read_bytes()[:-1] + b"\0")
    words = words_of("finetune", out, digits, "--nproc", 2)
    code, _, error = call(*words, "--weights", tmp_path / "other.safetensors")
    assert (code, error.count("\n")) == (2, 1), error
    assert f"classifier.weights={tmp_path}/other.safetensors (--weights) are other weights" in error


def test_a_checkpoint_knows_the_weights_that_the_run_was_begun_with(whole, weights):
    manifest = read_manifest(whole("finetune", 2) / "checkpoints" / f"step_{STEPS:08d}")
    assert manifest["started_from"]["sha256"] == digest_of(weights)


def test_a_run_of_an_earlier_release_goes_on(killed, digits, mae_scale, tmp_path, monkeypatch):
    """Its manifests know no weights, its recipe's digest was taken with the paths, its index has the root as given."""
    out = killed("finetune", 1)
    checkpoint = out / "checkpoints" / f"step_{KILLED_AFTER:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("started_from", "manifest_sha256"):
        del manifest[name]
    files = manifest.pop("files")
    write_manifest(checkpoint, manifest | {"recipe_digest": "0" * 16}, files)
    done = mae_scale(*words_of("finetune", out, digits))
    assert done.returncode == 0, done.stderr
    assert f"going on from step {KILLED_AFTER}\n" in done.stdout
