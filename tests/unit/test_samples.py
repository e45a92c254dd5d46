"""The sample images: real, whole, the same each time, never written over anything else."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.errors import UsageError
from data_pipeline.samples import write_digits, write_photos


def digest(root: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        state.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("samples") / "digits")


def test_digits_are_all_there_in_a_stratified_split(digits):
    counts = {
        part: np.array([len(list((digits / part / str(d)).glob("*.jpg"))) for d in range(10)])
        for part in ("train", "val")
    }
    assert (counts["train"] + counts["val"]).tolist() == np.bincount(load_digits().target).tolist()
    assert np.allclose(counts["val"] / (counts["train"] + counts["val"]), 0.2, atol=0.01)


def test_a_digits_file_is_the_digit_that_it_says(digits):
    data = load_digits()
    for path in list(digits.rglob("*.jpg"))[::200]:
        number = int(path.stem)
        assert int(path.parent.name) == data.target[number]
        small = Image.open(path).resize((8, 8), Image.Resampling.BOX)
        original = data.images[number] * (255 / 16)
        assert np.corrcoef(np.asarray(small).ravel(), original.ravel())[0, 1] > 0.97


def test_writing_twice_changes_nothing_and_gives_the_same_bytes_elsewhere(digits, tmp_path):
    before = digest(digits)
    stamps = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert write_digits(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == stamps
    assert digest(write_digits(tmp_path / "again")) == before
    assert digest(write_photos(tmp_path / "a", 3)) == digest(write_photos(tmp_path / "b", 3))


def test_an_interrupted_call_is_finished_by_the_next(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.samples.finish_sample", stop)
        with pytest.raises(KeyboardInterrupt):
            write_photos(tmp_path / "photos", 2)
    assert digest(write_photos(tmp_path / "photos", 2)) == digest(write_photos(tmp_path / "whole", 2))


def test_photos_are_photographs_of_the_stated_size(tmp_path):
    root = write_photos(tmp_path / "photos", 5)
    photos = [Image.open(path) for path in sorted(root.glob("*.jpg"))]
    assert [(photo.size, photo.mode) for photo in photos] == [((500, 375), "RGB")] * 5
    assert len({photo.tobytes() for photo in photos}) == 5


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for write in (write_digits, lambda root: write_photos(root, 2)):
        with pytest.raises(UsageError, match="not empty"):
            write(tmp_path)
        with pytest.raises(UsageError, match="is a file"):
            write(tmp_path / "thesis.txt")
    write_photos(tmp_path / "photos", 2)
    with pytest.raises(UsageError, match="not empty"):
        write_photos(tmp_path / "photos", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "thesis.txt"]
