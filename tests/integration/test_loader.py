"""Batches are pure functions of (seed, step, position): whatever the ranks, micro-batches, threads and damage."""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch

from data_pipeline.bad_images import BadImagePolicy
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import EvaluationOrder, TrainingOrder
from data_pipeline.errors import RunError, UsageError
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.samples import write_digits
from tests.loaders import SEED, collect, on_cpu, same, training

DECODING, EVALUATION = on_cpu(), on_cpu(kind="evaluation")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "digits") / "val"


@pytest.fixture(scope="module")
def index(digits):
    return build_index(digits, progress=False)


@pytest.fixture
def copy(digits, tmp_path):
    """A copy of the images that a test may damage, and its index."""
    root = tmp_path / "copy"
    shutil.copytree(digits, root)
    return build_index(root, progress=False)


@pytest.fixture(scope="module")
def reference(index):
    return collect(index)


def test_a_batch_is_normalised_float_images_with_their_labels(index, reference):
    images, labels, ids, positions, replaced = reference[0]
    assert images.shape == (24, 3, 32, 32)
    assert (images.dtype, labels.dtype, ids.dtype, positions.dtype) == (
        torch.float32,
        torch.int64,
        np.int64,
        np.int64,
    )
    assert labels.tolist() == index.label[ids].tolist()
    assert positions.tolist() == list(range(24))
    assert replaced == 0
    assert len({image.numpy().tobytes() for image in images}) == 24


@pytest.mark.parametrize(
    "options",
    [
        {"world_size": 2},
        {"world_size": 3},
        {"micro_batch": 4},
        {"world_size": 3, "micro_batch": 2, "decoding": on_cpu(threads=1)},
        {"decoding": on_cpu(threads=5), "prefetch": 7},
    ],
    ids=["2 ranks", "3 ranks", "accumulation", "3 ranks, accumulation, 1 thread", "5 threads, prefetch"],
)
def test_the_global_batch_has_the_same_bytes(index, reference, options):
    assert same(collect(index, **options), reference)


def test_starting_in_the_middle_gives_the_same_bytes(index, reference):
    late = collect(index, steps=(2, 4))
    assert same(late, {step: reference[step] for step in (2, 3)})


def test_starting_in_a_later_epoch_gives_the_same_bytes(index):
    steps = 355 // 24
    through = collect(index, steps=(steps - 1, steps + 2))
    assert same(collect(index, steps=(steps + 1, steps + 2), world_size=2), {steps + 1: through[steps + 1]})


def test_another_seed_gives_other_batches(index, reference):
    other = collect(index, seed=12)
    assert not np.array_equal(other[0][2], reference[0][2])


def test_tar_shards_give_the_same_bytes_as_the_folder(index, digits, reference, tmp_path):
    names = [index.name(i) for i in range(len(index))]
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for name in names[shard * 120 : (shard + 1) * 120]:
                archive.add(digits / name, name)
    shards = build_index(tmp_path, progress=False)
    assert len(shards) == len(index)
    found = collect(shards)
    assert all(torch.equal(found[step][0], reference[step][0]) for step in reference)


@pytest.mark.parametrize(
    "kind", ["random_resized_crop_color_jitter", "fixed_crop", "none"], ids=["jitter", "fixed", "none"]
)
def test_every_augmentation_is_the_same_for_two_ranks(index, kind):
    one = collect(index, decoding=on_cpu(kind=kind), steps=(0, 2))
    assert same(collect(index, decoding=on_cpu(kind=kind), steps=(0, 2), world_size=2, micro_batch=6), one)


def test_every_image_is_loaded_exactly_once_an_epoch_but_for_the_remainder(index):
    steps = 355 // 24
    ids = np.concatenate([batch[2] for batch in collect(index, steps=(0, steps)).values()])
    assert len(ids) == len(set(ids)) == steps * 24


def test_evaluation_loads_every_image_exactly_once_on_any_number_of_ranks(index):
    whole = None
    for world_size, batch_size in ((1, 100), (3, 16)):
        found, lengths = {}, []
        for rank in range(world_size):
            with ImageLoader(index, EvaluationOrder(batch_size, rank, world_size), EVALUATION) as loader:
                batches = list(loader)
                lengths.append([len(batch.images) for batch in batches])
            for batch in batches:
                for i in np.flatnonzero(batch.valid):
                    assert int(batch.sample_ids[i]) not in found
                    found[int(batch.sample_ids[i])] = (batch.images[i], int(batch.labels[i]))
        assert all(length == lengths[0] for length in lengths)
        assert sorted(found) == list(range(len(index)))
        assert [found[i][1] for i in range(len(index))] == index.label.tolist()
        whole = whole or found
        assert all(torch.equal(found[i][0], whole[i][0]) for i in found)


def test_evaluation_can_be_gone_through_again(index):
    with ImageLoader(index, EvaluationOrder(200), EVALUATION) as loader:
        first, second = ([b.images for b in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size - 200)


def garble_header(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc4")
    data[at + 5 : at + 21] = b"\xff" * 16
    path.write_bytes(data)


def replace_by_text(path):
    path.write_bytes(b"<html>" + b" " * (path.stat().st_size - 6))


def replace_by_smaller_picture(path):
    from PIL import Image

    size = path.stat().st_size
    Image.new("L", (3, 3)).save(path, "JPEG")
    data = path.read_bytes()
    path.write_bytes(data + bytes(max(0, size - len(data))))


DAMAGES = [delete, truncate, garble_header, replace_by_text, replace_by_smaller_picture]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_an_image_that_turns_bad_is_replaced_by_the_same_neighbour_on_any_ranks(copy, reference, damage, caplog):
    row = 13
    bad = int(reference[1][2][row])
    damage(copy.path(bad))
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        one = collect(copy)
    assert caplog.text.count("bad image") == 1
    assert copy.name(bad) in caplog.text
    images, labels, ids, positions, replaced = one[1]
    neighbour = (bad + 1) % len(copy)
    assert (ids[row], replaced, int(labels[row])) == (neighbour, 1, copy.label[neighbour])
    others = np.arange(24) != row
    assert torch.equal(images[others], reference[1][0][others])
    assert not torch.equal(images[row], reference[1][0][row])
    assert positions.tolist() == list(range(24))
    assert same({0: one[0], 2: one[2]}, {0: reference[0], 2: reference[2]})
    for options in ({"world_size": 2}, {"world_size": 3, "micro_batch": 4, "decoding": on_cpu(threads=1)}):
        assert same(collect(copy, **options), one)
    assert same(collect(copy, steps=(1, 2)), {1: one[1]})


def test_a_bad_neighbour_is_passed_over(copy, reference):
    bad = int(reference[0][2][0])
    delete(copy.path(bad))
    replace_by_text(copy.path((bad + 1) % len(copy)))
    found = collect(copy, bad_images=BadImagePolicy(0.1), steps=(0, 1))
    assert found[0][2][0] == (bad + 2) % len(copy)


def test_bad_images_are_counted_with_their_reasons(copy, reference):
    first, second = (int(i) for i in reference[0][2][:2])
    delete(copy.path(first))
    garble_header(copy.path(second))
    with ImageLoader(copy, training(steps=(0, 30)), DECODING, bad_images=BadImagePolicy(0.5)) as loader:
        replaced = sum(batch.replaced for batch in loader)
    assert replaced >= 3
    found = loader.bad_images.found
    assert found[copy.name(first)] == "missing"
    assert "cannot be decoded" in found[copy.name(second)]
    assert len(found) == 2


def test_above_the_limit_the_run_stops_with_the_list(copy):
    for image in range(len(copy)):
        if image % 3 == 0:
            delete(copy.path(image))
    with pytest.raises(RunError, match=r"22 images turned bad.*missing.*and 2 more") as error:
        collect(copy, bad_images=BadImagePolicy(0.06))
    assert str(error.value).count("missing") == 20


def test_one_bad_image_is_always_allowed_and_stop_allows_none(copy, reference):
    bad = int(reference[0][2][5])
    delete(copy.path(bad))
    assert collect(copy, steps=(0, 1), bad_images=BadImagePolicy(0))[0][4] == 1
    with pytest.raises(RunError, match=f"{copy.name(bad)}: missing"):
        collect(copy, steps=(0, 1), bad_images=BadImagePolicy(action="stop"))


def test_a_bad_image_is_not_valid_in_an_evaluation(copy):
    delete(copy.path(30))
    with ImageLoader(copy, EvaluationOrder(50), EVALUATION) as loader:
        seen = [int(i) for batch in loader for i in batch.sample_ids[batch.valid]]
    assert seen == [i for i in range(len(copy)) if i != 30]


def test_a_shard_cut_in_the_middle_of_training_is_bad_images(index, digits, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(60):
            archive.add(digits / index.name(i), index.name(i))
    shards = build_index(tmp_path, progress=False)
    order = TrainingOrder(batch_layout(12), seed=SEED, stop_step=10)
    loader = ImageLoader(shards, order, DECODING, bad_images=BadImagePolicy(0.5))
    os.truncate(tmp_path / "a.tar", int(shards.offset[50]) + 10)
    with loader:
        assert sum(batch.replaced for batch in loader) > 0
    assert set(loader.bad_images.found) == {shards.name(i) for i in range(50, 60)}
    with pytest.raises(UsageError, match="has shrunk"):
        ImageLoader(shards, order, DECODING)


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mae-scale")]


def test_leaving_early_ends_the_threads_at_once(index):
    loader = ImageLoader(index, training(steps=(0, None)), DECODING)
    for batch in loader:
        if batch.number == 3:
            break
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 2
    iterator = iter(loader)
    assert next(iterator).number == 0
    del loader, iterator
    for _ in range(50):
        if not loader_threads():
            break
        time.sleep(0.05)
    assert loader_threads() == []


def test_an_error_in_the_thread_reaches_the_consumer(index, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("of the thread")

    monkeypatch.setattr("data_pipeline.batches.to_torch", fail)
    with pytest.raises(ZeroDivisionError, match="of the thread"):
        collect(index)
    assert loader_threads() == []


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "loader.close()"])
def test_the_interpreter_ends_while_a_loader_runs(digits, end):
    code = (
        "from data_pipeline.batch_layout import batch_layout\n"
        "from data_pipeline.batch_order import TrainingOrder\n"
        "from data_pipeline.index_build import build_index\n"
        "from data_pipeline.loader import ImageLoader\n"
        "from tests.loaders import SEED, collect, on_cpu, same, training\n"
        f"index = build_index({str(digits)!r}, progress=False)\n"
        "loader = ImageLoader(index, TrainingOrder(batch_layout(24, micro_batch=4)), on_cpu())\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        f"{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_objective_draws_comes_with_the_batch_and_is_drawn_in_the_background(index):
    """Masks and mixing take milliseconds: the training thread must not wait for them."""
    drawn_by, seen = set(), []

    def draw(step, positions):
        drawn_by.add(threading.current_thread().name)
        seen.append((step, positions.tolist()))
        return (torch.from_numpy(positions + 100 * step),)

    order = TrainingOrder(batch_layout(24, micro_batch=8), start_step=1, stop_step=3, batch_of=lambda step: step + 5)
    with ImageLoader(index, order, DECODING, draw=draw) as loader:
        batches = list(loader)
    assert drawn_by == {"mae-scale-loader"}
    assert seen == [(step, list(range(first, first + 8))) for step in (6, 7) for first in (0, 8, 16)]
    for batch in batches:
        (numbers,) = batch.drawn
        assert np.array_equal(numbers.numpy(), batch.positions + 100 * batch.number)
