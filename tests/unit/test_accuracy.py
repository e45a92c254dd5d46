"""Counting an evaluation: against scikit-learn, ties, rows without finite logits, candidates, ranks."""

import json
import math
import multiprocessing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from mae_scale.tasks.classification.accuracy import Accuracy

IMAGES, CLASSES, BATCH = 203, 12, 16
MEETING = timedelta(minutes=2)
CANDIDATES = np.array([7, 1, 10, 4, 2, 8])


def drawn(images: int = IMAGES, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [images, classes] without ties, leaning towards the labels [images]."""
    random = torch.Generator().manual_seed(3)
    labels = torch.randint(classes, (images,), generator=random)
    logits = torch.randn(images, classes, generator=random)
    logits[torch.arange(images), labels] += 1
    return logits, labels


def counted(logits, labels, candidates=None, valid=None) -> Accuracy:
    accuracy = Accuracy(logits.shape[1])
    valid = np.ones(len(labels), bool) if valid is None else valid
    for first in range(0, len(labels), BATCH):
        rows = slice(first, first + BATCH)
        accuracy.update(logits[rows], labels[rows], valid[rows], candidates)
    return accuracy


def test_agrees_with_scikit_learn():
    logits, labels = drawn()
    accuracy, results = counted(logits, labels), counted(logits, labels).results()
    names = np.arange(CLASSES)
    assert results["images"] == IMAGES
    assert results["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1, labels=names), rel=1e-12)
    assert results["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=names), rel=1e-12)
    assert results["loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=names), rel=1e-12)
    expected = confusion_matrix(labels, logits.argmax(1), labels=names)
    assert accuracy.confusion().dtype == np.int64
    assert np.array_equal(accuracy.confusion(), expected)
    assert accuracy.per_class() == [
        (name, int(expected[name].sum()), 100 * expected[name, name] / expected[name].sum()) for name in range(CLASSES)
    ]


def test_only_candidates_compete():
    logits, labels = drawn()
    keep = torch.isin(labels, torch.from_numpy(CANDIDATES))
    logits, labels = logits[keep], labels[keep]
    results = counted(logits, labels, CANDIDATES).results()
    names = np.sort(CANDIDATES)
    among = logits[:, names]
    assert results["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, among, k=1, labels=names), rel=1e-12)
    assert results["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, among, k=5, labels=names), rel=1e-12)
    assert results["loss"] == pytest.approx(log_loss(labels, among.double().softmax(1), labels=names), rel=1e-12)
    assert results["top1"] > counted(logits, labels).results()["top1"]


def test_rows_that_are_not_valid_are_not_counted():
    logits, labels = drawn()
    valid = np.arange(IMAGES) % 3 != 0
    padded, padded_labels = logits.clone(), labels.clone()
    padded[~valid], padded_labels[~valid] = math.nan, -1
    expected = counted(logits[valid], labels[valid]).results()
    for kind in (valid, torch.from_numpy(valid)):
        results = counted(padded, padded_labels, valid=kind).results()
        assert results["loss"] == pytest.approx(expected["loss"], rel=1e-12)  # summed in other groups
        assert {**results, "loss": 0} == {**expected, "loss": 0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_wrong(value):
    """Also where the strange value would win, or lies in a class that does not compete."""
    for candidates, strange in ((None, 2), (None, 0), (np.array([1, 2, 3]), 0)):
        logits = torch.tensor([[0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
        logits[0, strange] = value
        accuracy = counted(logits, torch.tensor([2, 2]), candidates)
        results = accuracy.results()
        assert (results["top1"], results["top5"], results["images"], results["non_finite"]) == (50, 50, 2, 1)
        assert math.isnan(results["loss"])
        assert accuracy.confusion().sum() == accuracy.confusion()[2, 2] == 1
        assert accuracy.per_class() == [(2, 2, 50.0)]


def test_of_equal_logits_the_lower_class_is_likelier():
    labels = torch.arange(8)
    accuracy = counted(torch.zeros(8, 8, dtype=torch.bfloat16), labels)
    assert accuracy.confusion()[:, 0].tolist() == [1] * 8
    assert accuracy.results()["top1"] == 100 / 8
    assert accuracy.top5_hits == 5
    assert counted(torch.zeros(3, 8), torch.tensor([2, 5, 7]), np.array([7, 5, 2])).per_class()[0] == (2, 1, 100.0)


def test_a_top1_hit_is_a_top5_hit_with_many_ties():
    logits, labels = drawn()
    logits = logits.round()
    one_by_one = [counted(logits[k : k + 1], labels[k : k + 1]).results() for k in range(IMAGES)]
    assert all(results["top1"] <= results["top5"] for results in one_by_one)
    together = counted(logits, labels).results()
    for name in ("top1", "top5"):
        assert together[name] == pytest.approx(np.mean([results[name] for results in one_by_one]))


def test_with_five_classes_or_fewer_every_image_is_a_top5_hit():
    logits, labels = drawn(40, 3)
    assert counted(logits, labels).results()["top5"] == 100


def test_many_classes_are_affordable():
    """iNaturalist 2018's 8,142 classes, whose matrix would have 530 MB."""
    logits, labels = drawn(64, 8142)
    accuracy = counted(logits, labels)
    assert len(accuracy.pairs) <= 64
    assert accuracy.images == 64


def test_nothing_counted_is_not_a_number():
    results = counted(*drawn(), valid=np.zeros(IMAGES, bool)).results()
    assert results["images"] == 0
    assert all(math.isnan(results[name]) for name in ("top1", "top5", "loss"))


@pytest.mark.parametrize(
    ("labels", "candidates", "message"),
    [([0, 12], None, "label 12 is none"), ([0, -1], None, "label -1 is none"), ([1, 0], CANDIDATES, "label 0 is none")],
)
def test_a_label_that_cannot_be_is_refused(labels, candidates, message):
    with pytest.raises(ValueError, match=message):
        Accuracy(CLASSES).update(torch.zeros(2, CLASSES), torch.tensor(labels), np.ones(2, bool), candidates)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"logits are \[2, 11\], expected \[B, 12\]"):
        Accuracy(CLASSES).update(torch.zeros(2, 11), torch.zeros(2, dtype=torch.long), np.ones(2, bool))


def count_my_part(rank: int, world: int, folder: str) -> None:
    """A rank's rows of each batch; rows past the last image only fill up and are not valid."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world, timeout=MEETING
    )
    logits, labels = drawn()
    logits[5, 0] = math.nan
    accuracy = Accuracy(CLASSES)
    for first in range(0, IMAGES, BATCH):
        positions = first + np.arange(BATCH).reshape(world, -1)[rank]
        rows = np.minimum(positions, IMAGES - 1)
        accuracy.update(logits[rows], labels[rows], positions < IMAGES)
    accuracy.reduce()
    counts = {
        "confusion": accuracy.confusion().tolist(),
        "top5_hits": accuracy.top5_hits,
        "images": accuracy.images,
        "results": {k: v for k, v in accuracy.results().items() if k != "loss"},
        "per_class": accuracy.per_class(),
    }
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


def test_one_and_two_ranks_count_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    count_my_part(0, 1, str(tmp_path))
    other = multiprocessing.get_context("spawn").Process(target=count_my_part, args=(1, 2, str(tmp_path)))
    other.start()
    count_my_part(0, 2, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert alone["images"] == IMAGES
    assert alone["results"]["non_finite"] == 1
    assert first == second == alone
