"""Evaluation sets as they are published, in small: which class each folder means, what is refused, mCE."""

import errno
import io
import tarfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from data_pipeline.errors import UsageError
from data_pipeline.index import INDEX_NAME, Index
from mae_scale.tasks.classification.datasets import (
    ALEXNET_ERROR,
    EXTRA_CORRUPTIONS,
    corruption_summary,
    imagenet_wnids,
    open_sets,
)

WNIDS = ImageNetInfo().label_names()
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
# AlexNet's top-1 error at severities 1 to 5, from which the divisors of mCE come.
ALEXNET_ERRORS = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 140, 40)).save(file, "JPEG")
    return file.getvalue()


JPEG = _jpeg()


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


def opened(root: Path, kind="folder", num_classes=1000, class_names=None):
    return open_sets(kind, root, num_classes=num_classes, class_names=class_names)


def meaning(evaluation_set) -> dict[str, int]:
    """The model's class of each image, by the image's name."""
    index = evaluation_set.index
    classes = evaluation_set.class_of[index.label]
    assert classes.dtype == np.int64
    return {index.name(image): int(classes[image]) for image in range(len(index))}


def refusal(root: Path, **options) -> str:
    with pytest.raises(UsageError) as refused:
        opened(root, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write_shard(root: Path, **labels: int | None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "0.tar", "w") as archive:
        for key, label in labels.items():
            members = {f"{key}.jpg": JPEG} | ({} if label is None else {f"{key}.cls": str(label).encode()})
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return root


def test_folders_are_matched_by_name_and_may_be_fewer(tmp_path):
    put(tmp_path, "fox/1.jpg", "ant/1.jpg", "ant/2.jpg")
    (one,) = opened(tmp_path, num_classes=4, class_names=["ant", "bee", "cow", "fox"])
    assert meaning(one) == {"ant/1.jpg": 0, "ant/2.jpg": 0, "fox/1.jpg": 3}
    assert (one.name, one.candidates, one.augmentation) == ("", None, "evaluation")
    assert (tmp_path / INDEX_NAME).exists()


def test_a_folder_that_training_did_not_have_is_named(tmp_path):
    put(tmp_path, "ant/1.jpg", "yak/1.jpg")
    (tmp_path / "empty").mkdir()  # holds no image, so that it needs no class
    message = refusal(tmp_path, num_classes=2, class_names=["ant", "bee"])
    assert "class folders that the training data did not have (1): yak;" in message
    put(tmp_path, "bee/1.jpg")
    (tmp_path / "yak/1.jpg").unlink()
    (one,) = opened(tmp_path, num_classes=2, class_names=["ant", "bee"])
    assert meaning(one) == {"ant/1.jpg": 0, "bee/1.jpg": 1}


def test_without_names_folders_are_taken_in_order_and_must_be_as_many(tmp_path):
    put(tmp_path, "10/1.jpg", "9/1.jpg", "b/1.jpg")
    (one,) = opened(tmp_path, num_classes=3)
    assert meaning(one) == {"10/1.jpg": 0, "9/1.jpg": 1, "b/1.jpg": 2}
    assert "holds 3 class folders, but the model has 4 classes" in refusal(tmp_path, num_classes=4)


def test_without_names_wnids_are_matched_to_imagenet(tmp_path):
    put(tmp_path, f"{WNIDS[7]}/1.jpg", f"{WNIDS[999]}/1.jpg")
    (one,) = opened(tmp_path)
    assert sorted(meaning(one).values()) == [7, 999]
    assert "holds 2 class folders, but the model has 10 classes" in refusal(tmp_path, num_classes=10)


def test_a_model_trained_on_shards_is_evaluated_on_folders_and_shards(tmp_path):
    numbers = ["0", "1", "2"]
    put(tmp_path / "folders", "ant/1.jpg", "bee/1.jpg", "cow/1.jpg")
    (one,) = opened(tmp_path / "folders", num_classes=3, class_names=numbers)
    assert list(meaning(one).values()) == [0, 1, 2]
    write_shard(tmp_path / "shards", a=1, b=0, c=1)
    for names in (numbers, ["ant", "bee", "cow"], None):
        (one,) = opened(tmp_path / "shards", num_classes=3, class_names=names)
        assert one.class_of[one.index.label].tolist() == [1, 0, 1]
    assert "labels up to 1, but the model has 1 classes" in refusal(tmp_path / "shards", num_classes=1)
    write_shard(tmp_path / "bare", a=0, b=None)
    assert "1 of the 2 images" in (message := refusal(tmp_path / "bare", num_classes=3))
    assert "b.jpg, have no label; expected a .cls member" in message


def test_images_outside_class_folders_are_refused(tmp_path):
    put(tmp_path / "flat", "1.jpg", "2.jpg")
    assert "2 of the 2 images" in refusal(tmp_path / "flat", num_classes=2)
    put(tmp_path / "mixed", "loose.jpg", "ant/1.jpg", "bee/1.jpg")
    message = refusal(tmp_path / "mixed", num_classes=2)
    assert "1 of the 3 images" in message
    assert "such as loose.jpg, lie in no class folder" in message


def test_classes_below_folders_of_them_are_matched_by_their_whole_names(tmp_path):
    """iNaturalist as it is published; the model saw one class more."""
    root = put(tmp_path, "Aves/3100/1.jpg", "Aves/3101/1.jpg", "Fungi/5600/1.jpg")
    trained_on = ["Aves/3100", "Aves/3101", "Fungi/5599", "Fungi/5600"]
    (one,) = opened(root, num_classes=4, class_names=trained_on)
    assert list(meaning(one).values()) == [0, 1, 3]
    assert "class folders that the training data did not have (3)" in refusal(
        root, num_classes=2, class_names=["Aves", "Fungi"]
    )


def test_one_folder_inside_each_class_changes_nothing(tmp_path):
    """Tiny-ImageNet: <class>/images/*.JPEG; and images beside folders of more images."""
    put(tmp_path, "ant/images/1.JPEG", "ant/images/2.JPEG", "bee/1.jpg", "bee/more/1.jpg", "bee/old/1.jpg")
    (one,) = opened(tmp_path, num_classes=2)
    assert list(meaning(one).values()) == [0, 0, 1, 1, 1]


def test_the_wnids_of_timm_are_imagenets():
    assert imagenet_wnids() == WNIDS == sorted(set(WNIDS))
    for name in ("imagenet_a", "imagenet_r"):
        wnids = imagenet_wnids(name)
        indices = resources.files("timm").joinpath("data", "_info", f"{name}_indices.txt").read_text().split()
        assert len(set(wnids)) == 200
        assert [WNIDS[int(index)] for index in indices] == wnids == sorted(wnids)
    assert (imagenet_wnids("imagenet_a")[0], imagenet_wnids("imagenet_r")[0]) == ("n01498041", "n01443537")


@pytest.mark.parametrize("kind", ["imagenet-a", "imagenet-r"])
def test_the_200_classes_of_imagenet_a_and_r_compete(tmp_path, kind, caplog):
    wnids = imagenet_wnids(kind.replace("-", "_"))
    put(tmp_path, *(f"{wnid}/x.jpg" for wnid in wnids))
    (tmp_path / "README.txt").write_text("published with it")
    (one,) = opened(tmp_path, kind=kind, class_names=WNIDS)
    assert meaning(one) == {f"{wnid}/x.jpg": WNIDS.index(wnid) for wnid in wnids}
    assert one.candidates.dtype == np.int64
    assert [WNIDS[number] for number in one.candidates] == wnids
    assert one.augmentation == "evaluation"
    assert "another number of images than the" in caplog.text  # 200 here


def test_missing_and_strange_classes_are_counted_and_named(tmp_path):
    wnids = imagenet_wnids("imagenet_a")
    put(tmp_path, *(f"{wnid}/x.jpg" for wnid in wnids[7:]), "n01440764/x.jpg")
    message = refusal(tmp_path, kind="imagenet-a")
    assert f"lacks 7 of the 200 class folders ({', '.join(wnids[:5])} and 2 more)" in message
    assert "holds 1 that do not belong to it (n01440764)" in message
    assert not (tmp_path / INDEX_NAME).exists()
    put(tmp_path, *(f"{wnid}/x.jpg" for wnid in wnids[:7]))
    assert "it holds 1 that do not belong to it (n01440764);" in refusal(tmp_path, kind="imagenet-a")
    put(tmp_path / "above", f"imagenet-a/{wnids[0]}/x.jpg")
    assert "lacks 200 of the 200" in refusal(tmp_path / "above", kind="imagenet-a")


def test_imagenet_sketch_has_all_classes(tmp_path):
    put(tmp_path, *(f"{wnid}/sketch_0.JPEG" for wnid in WNIDS))
    (one,) = opened(tmp_path, kind="imagenet-sketch")
    assert list(meaning(one).values()) == list(range(1000))
    assert one.candidates is None
    (tmp_path / WNIDS[3] / "sketch_0.JPEG").unlink()
    (tmp_path / WNIDS[3]).rmdir()
    assert f"lacks 1 of the 1000 class folders ({WNIDS[3]})" in refusal(tmp_path, kind="imagenet-sketch")


def corruption_files(corruption: str, wnids=(WNIDS[5], WNIDS[600])) -> list[str]:
    return [f"{corruption}/{severity}/{wnid}/x.JPEG" for severity in range(1, 6) for wnid in wnids]


def test_imagenet_c_in_groups_and_without(tmp_path, caplog):
    for group, corruptions in GROUPS.items():
        for corruption in corruptions:
            put(tmp_path / "grouped" / group, *corruption_files(corruption))
            put(tmp_path / "direct", *corruption_files(corruption))
    put(tmp_path / "grouped" / "extra", *corruption_files("spatter"))
    expected = [f"{corruption}/{severity}" for corruption in ALEXNET_ERROR for severity in range(1, 6)]
    direct = opened(tmp_path / "direct", kind="imagenet-c")
    assert [one.name for one in direct] == expected
    grouped = opened(tmp_path / "grouped", kind="imagenet-c")
    assert [one.name for one in grouped] == expected + [f"spatter/{severity}" for severity in range(1, 6)]
    for one in (*direct, *grouped):
        assert sorted(meaning(one).values()) == [5, 600]
        assert (one.candidates, one.augmentation) == (None, "evaluation_whole")
        assert one.index.root.parts[-2:] == tuple(one.name.split("/"))
    assert "75 of 75 sets hold another number of images than the 50,000 published" in caplog.text
    assert "gaussian_noise/1 has 2, of 2 classes" in caplog.text


def test_all_that_imagenet_c_lacks_is_named(tmp_path):
    for corruption in ALEXNET_ERROR:
        if corruption != "snow":
            put(tmp_path, *(name for name in corruption_files(corruption) if not name.startswith(("fog/3", "fog/5"))))
    put(tmp_path / "extra", f"saturate/1/{WNIDS[0]}/x.JPEG")
    assert "it lacks snow/1-5 fog/3,5 saturate/2,3,4,5;" in refusal(tmp_path, kind="imagenet-c")


def test_imagenet_c_with_other_classes_is_refused(tmp_path):
    for corruption in ALEXNET_ERROR:
        put(tmp_path, *corruption_files(corruption))
    put(tmp_path, f"{next(iter(ALEXNET_ERROR))}/1/n99999999/x.JPEG")
    assert "folders that are no classes of ImageNet-1K (1): n99999999" in refusal(tmp_path, kind="imagenet-c")


@pytest.mark.parametrize("kind", ["imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c"])
def test_imagenet_sets_need_a_model_of_imagenets_classes(tmp_path, kind):
    assert f"{kind} needs a model of ImageNet-1K's 1000 classes; this one has 10" in refusal(
        tmp_path, kind=kind, num_classes=10
    )
    other = [*WNIDS[:-1], "zebra"]
    assert "1000 other ones, such as zebra" in refusal(tmp_path, kind=kind, class_names=other)


def test_what_is_not_there_is_one_line(tmp_path):
    assert "unknown evaluation set 'imagenet-v2'; expected one of folder, imagenet-a" in refusal(
        tmp_path, kind="imagenet-v2"
    )
    for kind in ("folder", "imagenet-a", "imagenet-c"):
        assert f"{tmp_path}/none" in refusal(tmp_path / "none", kind=kind)


def test_a_folder_that_cannot_be_written_is_evaluated(tmp_path, caplog, monkeypatch):
    def refuse(self, path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    put(tmp_path, "ant/1.jpg")
    monkeypatch.setattr(Index, "save", refuse)
    assert len(opened(tmp_path, num_classes=1)) == 1
    assert "the index is not kept" in caplog.text


def test_alexnets_own_errors_give_an_mce_of_100():
    errors = {f"{name}/{k + 1}": 100 * error for name, five in ALEXNET_ERRORS.items() for k, error in enumerate(five)}
    summary = corruption_summary(errors)
    assert summary["mCE"] == pytest.approx(100, abs=1e-9)
    assert list(summary["corruptions"]) == list(ALEXNET_ERROR)
    for name, numbers in summary["corruptions"].items():
        assert numbers["CE"] == pytest.approx(100, abs=1e-9)
        assert numbers["error"] == pytest.approx(100 * ALEXNET_ERROR[name], abs=1e-9)


def test_extra_corruptions_are_no_part_of_mce():
    errors = {f"{name}/{severity}": 50.0 for name in ALEXNET_ERROR for severity in range(1, 6)}
    mean_ce = np.mean([50 / error for error in ALEXNET_ERROR.values()])
    assert corruption_summary(errors)["mCE"] == pytest.approx(mean_ce)
    extra = {f"{name}/{severity}": 20.0 * (severity - 1) for name in EXTRA_CORRUPTIONS for severity in range(1, 6)}
    summary = corruption_summary(errors | extra)
    assert summary["mCE"] == pytest.approx(mean_ce)
    assert summary["corruptions"]["saturate"] == {"error": 40.0}
    with pytest.raises(KeyError, match="fog/4"):
        corruption_summary({name: error for name, error in errors.items() if name != "fog/4"})
