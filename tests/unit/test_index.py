"""The index as a file, and parts of it."""

import os
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from data_pipeline.index import INDEX_NAME, DamagedIndex, load_index
from data_pipeline.index_build import build_index, open_index
from tests.pictures import index_of, put


def test_saved_index_is_the_same_again(folder, tmp_path):
    put(folder, "a/empty.jpg", b"")
    index = index_of(folder)
    index.save(tmp_path / "elsewhere" / "index.npz")
    again = load_index(tmp_path / "elsewhere" / "index.npz")
    assert (again.digest(), again.unreadable, again.root) == (index.digest(), index.unreadable, index.root)
    assert os.listdir(tmp_path / "elsewhere") == ["index.npz"]


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_a_damaged_index_file_is_one_clear_error(folder, keep):
    open_index(folder, progress=False)
    file = folder / INDEX_NAME
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DamagedIndex, match="damaged or not an index"):
        load_index(file)


def test_few_labels_are_a_number_per_class_drawn_with_the_seed_in_the_order_of_the_index(digits):
    index = build_index(digits / "train", progress=False)
    few = index.few(10, seed=0)
    assert np.array_equal(np.bincount(few.label), np.full(10, 10))
    names = [few.name(i) for i in range(len(few))]
    assert names == sorted(names)
    assert names == [few2.name(i) for few2 in [index.few(10, seed=0)] for i in range(100)]
    other = index.few(10, seed=1)
    assert names != [other.name(i) for i in range(100)]
    sizes = {index.name(i): int(index.num_bytes[i]) for i in range(len(index))}
    assert all(sizes[name] == few.num_bytes[i] for i, name in enumerate(names))
    with pytest.raises(UsageError, match="choose at most that many"):
        index.few(1000, seed=0)


def test_a_share_is_drawn_with_the_seed_from_all_images_and_part_of_every_larger_share(digits):
    index = build_index(digits / "train", progress=False)

    def names(fraction: float, seed: int = 0) -> list[str]:
        part = index.share(fraction, seed=seed)
        return [part.name(i) for i in range(len(part))]

    shares = [names(fraction) for fraction in (0.01, 0.1, 0.5, 1)]
    assert [len(share) for share in shares] == [14, 144, 721, 1442]
    assert all(share == sorted(share) for share in shares)
    for smaller, larger in pairwise(shares):
        assert set(smaller) < set(larger)
    assert names(0.5) == names(0.5)
    common = len(set(names(0.5)) & set(names(0.5, seed=1)))
    assert abs(common - 721 / 2) < 4 * np.sqrt(721 / 4)  # two seeds share half of their halves
    per_class = np.bincount(index.share(0.5, seed=0).label) / np.bincount(index.label)
    assert per_class == pytest.approx(np.full(10, 0.5), abs=0.15)
