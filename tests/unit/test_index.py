"""The index as a file, and parts of it."""

import os

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
