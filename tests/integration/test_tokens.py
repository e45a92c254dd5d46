"""`mae-scale tokens`: the words of a folder, the same on any ranks, resumed, verified, and trained on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from data_pipeline.errors import UsageError
from data_pipeline.index_build import open_index
from mae_scale import load_tokeniser
from mae_scale.models.weights.tokeniser import tokeniser_digest
from mae_scale.tasks.tokens import open_tokens
from tests.faults.harness import newest_whole_step
from tests.tiny import arguments, losses
from tests.tokenisers import tokeniser_file

RECIPE = ["demo", "model.patch_size=8", "data.threads=1"]
SHARD = ["--shard-images", "100"]
BAD = 152
"""An image that is trained on in the second step of 120."""


@pytest.fixture(scope="module")
def tokeniser(digits, tmp_path_factory):
    return tokeniser_file(tmp_path_factory.mktemp("tokeniser") / "weights.safetensors", digits, words=50)


@pytest.fixture(scope="module")
def write(mae_scale, digits, tokeniser):
    """Write the words of the digits' validation images, in four shards."""

    def run(out, *words, nproc=1):
        given = ["--tokeniser", tokeniser, "--out", out, "--nproc", nproc, f"data.root={digits}/val"]
        return mae_scale("tokens", *RECIPE, *SHARD, *given, *words)

    return run


@pytest.fixture(scope="module")
def written(write, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "words"
    done = write(out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 355 images x 16 of 50 words, 4 files\n"
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opened(folder, digits, tokeniser, **changes):
    index = changes.pop("index", None) or open_index(digits / "val", progress=False)
    digest = changes.pop("digest", None) or tokeniser_digest(load_tokeniser(tokeniser))
    return open_tokens(folder, index, digest, changes.pop("grid", 4), **{"image_size": 32, **changes})


@pytest.fixture
def images(digits, tmp_path):
    """A copy of the digits' validation images, with its index."""
    copy = shutil.copytree(digits / "val", tmp_path / "val", ignore=shutil.ignore_patterns(".*"))
    return open_index(copy, progress=False)


def spoil(path):
    """Overwrite an image by garbage that its index does not notice; return the function that restores it."""
    sound, status = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(sound)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return lambda: path.write_bytes(sound)


def unreadable(folder):
    """The rows of the images that have no words, by shard."""
    return [shard["unreadable"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_listed_and_replaced_in_training_and_once_restored_has_its_words(
    written, write, images, digits, tokeniser, mae_scale, tmp_path
):
    words, root = tmp_path / "words", f"data.root={images.root}"
    restore = spoil(images.path(BAD))
    done = write(words, root)
    assert done.returncode == 0, done.stderr
    assert unreadable(words) == [[], [BAD], [], []]
    given = ["model.target=tokens", f"tokeniser.weights={tokeniser}", f"tokeniser.tokens={words}", root]
    given += ["data.augmentation=none", "schedule.epochs=3", "checkpoint.every_steps=1", "tracking.uri=off"]
    train = ["pretrain", "demo", *arguments(digits, *given)]
    done = mae_scale(*train, "--out", tmp_path / "around")
    assert done.returncode == 0, done.stderr
    assert f"bad image {images.path(BAD)}" in "".join((done.stdout + done.stderr).split("\n"))
    restore()
    out = tmp_path / "run"
    done = mae_scale(*train, "--out", out)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"image {BAD} of the index has no words in {words}, for it could not be read" in done.stderr
    assert newest_whole_step(out) == max(losses(out)) > 0  # what was being written is there
    done = write(words, root)
    assert done.returncode == 0, done.stderr
    assert files(words) == files(written)
    done = mae_scale(*train, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout


def test_the_limit_on_images_that_cannot_be_read_is_on_all_of_them_and_not_on_a_file_s(
    write, images, digits, tokeniser, call, tmp_path
):
    root = f"data.root={images.root}"
    for row in (150, 151, 152):  # 3 % of their file, 0.8 % of all
        spoil(images.path(row))
    done = write(tmp_path / "words", root, "data.bad_image_limit=0.005")
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"error: 3 of 355 images cannot be read, such as {images.name(150)}; data.bad_image_limit allows 1" in last
    given = [f"tokeniser.weights={tokeniser}", f"tokeniser.tokens={tmp_path}/words", root, "data.augmentation=none"]
    code, _, error = call("pretrain", "demo", "--out", tmp_path, *arguments(digits, "model.target=tokens", *given))
    assert (code, error.count("\n")) == (2, 1), error
    assert "words are not complete; run the same `mae-scale tokens` again to finish them" in error
    done = write(tmp_path / "words", root, "data.bad_image_limit=0.01")
    assert done.returncode == 0, done.stderr
    assert unreadable(tmp_path / "words") == [[], [150, 151, 152], [], []]


@pytest.mark.slow
def test_they_are_the_tokeniser_s_of_the_evaluation_crop_in_the_index_s_order(written, digits, tokeniser):
    from PIL import Image

    assert list(files(written)) == ["manifest.json", *(f"words_0000{n}.npy" for n in range(4))]
    assert np.load(written / "words_00003.npy").dtype == np.uint16
    model, index = load_tokeniser(tokeniser), open_index(digits / "val", progress=False)
    found = opened(written, digits, tokeniser).rows(np.array([354, 0, 217, 99, 100]))
    assert (found.dtype, found.shape) == (np.int64, (5, 16))
    for words, row in zip(found, (354, 0, 217, 99, 100), strict=True):
        # 32 px images are resized to 36 px and cut: DALI's and Pillow's cubic filters differ by less than 1 of 255.
        image = Image.open(index.path(row)).convert("RGB").resize((36, 36), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image.crop((2, 2, 34, 34)))).permute(2, 0, 1)[None] / 255
        assert np.mean(words == model.tokens(pixels).numpy()[0]) > 0.8


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one(written, write, tmp_path):
    done = write(tmp_path / "words", "engine.micro_batch=7", nproc=2)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "words") == files(written)


@pytest.mark.slow
def test_after_sigkill_the_same_command_keeps_what_is_whole_and_writes_the_rest(
    written, write, digits, tokeniser, tmp_path
):
    out = tmp_path / "words"
    given = ["--tokeniser", tokeniser, "--out", out, f"data.root={digits}/val"]
    command = [sys.executable, "-m", "mae_scale", "tokens", *RECIPE, *SHARD, *given]
    process = subprocess.Popen(list(map(str, command)))
    while not list(out.glob("words_*.json")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "unfinished.json").exists()
    first = (out / "words_00000.npy").stat()
    with pytest.raises(UsageError, match="are not complete; run the same `mae-scale tokens` again"):
        opened(out, digits, tokeniser)
    done = write(out, nproc=2)
    assert done.returncode == 0, done.stderr
    assert (out / "words_00000.npy").stat().st_mtime_ns == first.st_mtime_ns
    assert {k: v for k, v in files(out).items() if not k.startswith(".")} == files(written)


@pytest.mark.slow
def test_damage_is_found_and_the_same_command_mends_it(written, write, mae_scale, tmp_path):
    out = tmp_path / "words"
    shutil.copytree(written, out)
    content = bytearray((out / "words_00002.npy").read_bytes())
    content[-1] ^= 1
    (out / "words_00002.npy").write_bytes(content)
    (out / "words_00001.npy").unlink()
    done = mae_scale("tokens", "--verify", out)
    assert done.returncode == 1
    assert "words_00001.npy: No such file" in done.stdout
    assert "words_00002.npy: its bytes have changed since it was written (sha256)" in done.stdout
    assert write(out).returncode == 0
    assert files(out) == files(written)
    done = mae_scale("tokens", "--verify", out)
    assert (done.returncode, done.stdout) == (0, "355 images x 16 words, every file has its digest\n")


@pytest.mark.slow
def test_other_inputs_are_refused_where_they_are_written_and_where_they_are_read(
    written, write, digits, tokeniser, tmp_path
):
    for words in (["model.patch_size=16"], ["data.exif_orientation=true"], ["data.fraction=0.5"]):
        done = write(written, *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "holds the words of other inputs (" in done.stderr
    index = open_index(digits / "val", progress=False)
    for changes, message in (
        ({"index": index.take(np.arange(354))}, "data.root, data.fraction or the order of the images differ"),
        ({"digest": "0" * 64}, "tokeniser 000000000000"),
        ({"grid": 8}, "words per side 4, expected 8"),
        ({"image_size": 64}, "pixels per side 32, expected 64"),
        ({"exif_orientation": True}, "EXIF orientation False, expected True"),
    ):
        with pytest.raises(UsageError) as error:
            opened(written, digits, tokeniser, **changes)
        assert "holds the words of other inputs" in str(error.value)
        if "tokeniser" not in message:
            assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo", "pretrain/beit_demo"])
def test_training_on_them_is_training_on_words_that_are_found(recipe, mae_scale, digits, tokeniser, tmp_path):
    sizes = arguments(digits, "model.target=tokens", f"tokeniser.weights={tokeniser}", "data.augmentation=none")
    if recipe != "demo":
        sizes = [word for word in sizes if "decoder" not in word]
    words = [*sizes, "schedule.epochs=1", "schedule.warmup_epochs=0", "tracking.uri=off"]
    done = mae_scale("tokens", recipe, *words, "--out", tmp_path / "words")
    assert done.returncode == 0, done.stderr
    for name, more in (("found", []), ("stored", [f"tokeniser.tokens={tmp_path}/words"])):
        done = mae_scale("pretrain", recipe, "--out", tmp_path / name, *words, *more)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "stored") == losses(tmp_path / "found")
    rows = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("stored", "found")]
    assert rows[0]["val/loss"] == rows[1]["val/loss"]
    done = mae_scale("pretrain", recipe, "--out", tmp_path / "x", *words, *more, "data.augmentation=fixed_crop")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "holds the words of centre crops" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give a recipe and --out DIR to write words, or --verify DIR to check them"),
        (["demo"], "give a recipe and --out DIR"),
        (["demo", "--verify", "x"], "--verify only checks a folder"),
        (["--verify", "nothing"], "nothing has no manifest.json"),
        (["demo", "--out", "w"], "data.root is not set; add data.root="),
        (["demo", "--out", "w", "data.root=x"], "tokeniser.weights is not set; add --tokeniser PATH"),
        (["demo", "--out", "w", "data.root=x", "--tokeniser", "none"], "--tokeniser none does not exist"),
        (["pretrain/dvae_demo", "--out", "w", "data.root=x", "--tokeniser", "."], "task: dvae reads no words"),
        (["demo", "--out", "w", "data.root=x", "--tokeniser", ".", "model.patch_size=5"], "multiple of patch_size 5"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, says, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = call("tokens", *words)
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_waits_for_one_with_a_file_more_longer_than_for_an_answer_in_training(write, tmp_path):
    """One file, of the first rank: the other has none, and has waited when that is written."""
    seconds = ["model.image_size=96", "--shard-images", "400", "engine.collective_timeout_s=2"]
    done = write(tmp_path / "words", *seconds, nproc=2)
    assert done.returncode == 0, done.stderr
