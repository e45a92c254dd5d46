"""Tokenisers and folders of words that cannot be used: refused in one line, none of them run, nothing left behind."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.old_runs import unpack
from tests.tiny import arguments
from tests.tokenisers import tokeniser_file

RECIPE = ["demo", "model.patch_size=8", "--shard-images", "100"]


@pytest.fixture(scope="module")
def tokeniser(digits, tmp_path_factory):
    return tokeniser_file(tmp_path_factory.mktemp("tokeniser") / "weights.safetensors", digits, words=12)


@pytest.fixture(scope="module")
def written(mae_scale, digits, tokeniser, tmp_path_factory):
    """The words of the digits' validation images, in four shards."""
    out = tmp_path_factory.mktemp("tokens") / "words"
    done = mae_scale("tokens", *RECIPE, "--tokeniser", tokeniser, "--out", out, f"data.root={digits}/val")
    assert done.returncode == 0, done.stderr
    return out


def training(digits, tokeniser, *more):
    """Arguments of a pre-training on words; the validation images are as many as one batch."""
    given = [f"data.root={digits}/val", "data.global_batch=355", "data.augmentation=none", "tracking.uri=off"]
    return [
        "pretrain",
        "demo",
        *arguments(digits, "model.target=tokens", f"tokeniser.weights={tokeniser}", *given, *more),
    ]


def is_refused(code, error):
    return code == 2 and error.startswith("error: ") and error.count("\n") == 1


def is_empty(out):
    return not out.exists() or not list(out.iterdir())


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def hostile(name):
    def make(folder, _):
        torch.save({"blocks.input.weight": Hostile(folder / "mark")}, folder / name)
        return folder / name

    return make


def hostile_plain(folder, _):
    (folder / "plain.pkl").write_bytes(pickle.dumps(Hostile(folder / "mark")))
    return folder / "plain.pkl"


def cut(folder, sound):
    (folder / "cut.safetensors").write_bytes(sound.read_bytes()[:-100])
    return folder / "cut.safetensors"


def not_finite(folder, sound):
    weights = load_file(sound)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "nan.safetensors")
    return folder / "nan.safetensors"


def empty(folder, _):
    (folder / "run").mkdir()
    return folder / "run"


BAD_TOKENISERS = [
    (hostile("encoder.pkl"), "was refused: it names io.open, which a module does not need"),
    (hostile_plain, "was refused: it names io.open, which a module does not need"),
    (hostile("encoder.pth"), "was refused: it is damaged, or holds more than tensors, which could run code when read"),
    (cut, "is not a whole safetensors file"),
    (not_finite, "holds weights that are not finite"),
    (empty, "holds no checkpoint; expected a run's folder"),
    (lambda folder, _: unpack("pretrain_one_rank", folder)[0], "is of a run of task mae, which trains no tokeniser"),
]


@pytest.mark.parametrize(("make", "says"), BAD_TOKENISERS)
def test_training_refuses_what_is_no_tokeniser(make, says, digits, tokeniser, call, tmp_path):
    bad = make(tmp_path, tokeniser)
    code, _, error = call(*training(digits, bad), "--out", tmp_path / "out")
    assert is_refused(code, error), error
    assert f"{bad} {says}" in error
    assert "add_safe_globals" not in error  # torch's advice to read the file all the same
    assert not (tmp_path / "mark").exists()
    assert is_empty(tmp_path / "out")


@pytest.mark.parametrize("make", [hostile("encoder.pkl"), cut])
def test_tokens_refuses_what_is_no_tokeniser(make, digits, tokeniser, mae_scale, tmp_path):
    bad = make(tmp_path, tokeniser)
    done = mae_scale("tokens", *RECIPE, "--tokeniser", bad, "--out", tmp_path / "out", f"data.root={digits}/val")
    assert is_refused(done.returncode, done.stderr), done.stderr
    assert str(bad) in done.stderr
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def missing(words):
    shutil.rmtree(words)


def shard_cut_short(words):
    path = words / "words_00002.npy"
    path.write_bytes(path.read_bytes()[:500])


def shard_gone(words):
    (words / "words_00003.npy").unlink()


def manifest_cut_short(words):
    path = words / "manifest.json"
    path.write_bytes(path.read_bytes()[:300])


def record_without_digest(words):
    path = words / "manifest.json"
    path.write_text(path.read_text().replace('"sha256"', '"md5"', 1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "has no manifest.json; give a folder that `mae-scale tokens --out` has written"),
        (shard_cut_short, "words_00002.npy cannot be read (mmap length is greater than file size)"),
        (shard_gone, "words_00003.npy cannot be read (No such file or directory)"),
        (manifest_cut_short, "manifest.json is damaged; remove {words} and run the same `mae-scale tokens` again"),
        (record_without_digest, "manifest.json is damaged; remove {words}"),
    ],
)
def test_training_refuses_words_that_are_not_whole(damage, says, written, digits, tokeniser, call, tmp_path):
    words = shutil.copytree(written, tmp_path / "words")
    damage(words)
    code, _, error = call(*training(digits, tokeniser, f"tokeniser.tokens={words}"), "--out", tmp_path / "out")
    assert is_refused(code, error), error
    assert says.format(words=words) in error
    assert is_empty(tmp_path / "out")


def test_a_word_that_the_tokeniser_does_not_have_ends_a_run_in_one_line(
    written, digits, tokeniser, mae_scale, tmp_path
):
    words = shutil.copytree(written, tmp_path / "words")
    content = bytearray((words / "words_00003.npy").read_bytes())
    content[-1] = 255
    (words / "words_00003.npy").write_bytes(content)
    done = mae_scale(*training(digits, tokeniser, f"tokeniser.tokens={words}"), "--out", tmp_path / "out")
    assert is_refused(done.returncode, done.stderr), done.stderr
    assert f"{words} holds word 65" in done.stderr
    assert "expected 0 to 11: a file is damaged" in done.stderr


def test_tokens_writes_into_no_file_and_no_folder_of_other_files(digits, tokeniser, mae_scale, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    folder.mkdir()
    for path in (file, folder / "notes.txt"):
        path.write_text("mine")
    for out, says in (
        (file, f"--out {file} is a file, expected a folder"),
        (file / "below", f"--out {file}/below cannot be written to: Not a directory"),
        (folder, f"--out {folder} holds notes.txt and no words; choose an empty or a new folder"),
    ):
        done = mae_scale("tokens", *RECIPE, "--tokeniser", tokeniser, "--out", out, f"data.root={digits}/val")
        assert is_refused(done.returncode, done.stderr), done.stderr
        assert says in done.stderr
    assert sorted(tmp_path.rglob("*")) == [file, folder, folder / "notes.txt"]
    assert {path.read_text() for path in (file, folder / "notes.txt")} == {"mine"}
