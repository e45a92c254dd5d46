"""What detection and segmentation refuse: one line that says what is wrong, exit code 2, nothing written."""

import json

import pytest
from PIL import Image

from tests.dense import TASKS, TRAIN, arguments, scenes_in


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def refused(scenes, call, tmp_path):
    """Start a task from random weights; its one line of error."""

    def run(task, *more, start=("from_scratch=true",)):
        words = [*arguments(task, scenes), *(f"{task}.{word}" for word in start), *more]
        code, _, error = call("finetune", *words, "--out", tmp_path / "out", "--dry-run")
        assert code == 2, error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()
        (line,) = [line for line in error.splitlines() if line.startswith("error:")]
        return line

    return run


@pytest.fixture
def changed(scenes, tmp_path):
    """COCO's JSON of the training scenes, changed; the override that names it."""

    def write(change):
        about = json.loads((scenes / "train" / "instances.json").read_text())
        change(about)
        (tmp_path / "changed.json").write_text(json.dumps(about))
        return f"detection.annotations={tmp_path}/changed.json"

    return write


DETECTION = {
    "detection.annotations=null": "is not set; add detection.annotations=/path/to/instances_train2017.json (COCO's",
    "detection.val_annotations=null": "detection.val_annotations=/path/to/instances_val2017.json",
    "detection.annotations=nowhere.json": "nowhere.json",
    "model.patch_size=5": "image_size 32 px is not a multiple of patch_size 5 px",
    "detection.global_blocks=3": "4 blocks cannot be cut into 3 equal parts",
    "data.augmentation=random_resized_crop": "task: detection takes large_scale_jitter or scale_jitter",
    "data.scale_range=[2,1]": "expected two factors above 0, the smaller one first",
    "data.exif_orientation=true": "data.exif_orientation would not move annotations",
    "schedule.step_epochs=[]": "schedule.shape=steps, and schedule.step_epochs=[]",
    "schedule.step_epochs=[1.5,9]": "expected them to rise, after the warm-up and before epoch 2",
    "checkpoint.keep_best=val/top1": "checkpoint.keep_best=val/top1 belongs to task: classification",
    "checkpoint.keep_best=val/loss": "is not measured by task: detection; use val/box_ap or train/loss",
    "tracking.knn_images=5": "task: detection measures its own accuracy",
    "model.encoder=beit": "model.encoder=beit needs model.layer_scale",
}
SEGMENTATION = {
    "segmentation.labels=null": "add segmentation.labels=/path/to/annotations",
    "segmentation.val_labels=null": "add segmentation.val_labels=/path/to/annotations",
    "segmentation.class_names=null": "segmentation.class_names is not set; add segmentation.class_names=FILE",
    "segmentation.labels=nowhere": "nowhere is no folder",
    "segmentation.maps_after=[0,1,2,4]": "expected four blocks, from 0, in rising order, of the 4",
    "segmentation.maps_after=[0,1,1,3]": "expected four blocks, from 0, in rising order, of the 4",
    "engine.micro_batch=2": "UperNet's BatchNorm takes its statistics from the whole global batch",
    "schedule.shape=steps": "schedule.shape=steps, and schedule.step_epochs=[]",
}


@pytest.mark.parametrize(("override", "said"), DETECTION.items())
def test_detection_refuses(override, said, refused):
    assert said in refused("detection", override)


@pytest.mark.parametrize(("override", "said"), SEGMENTATION.items())
def test_segmentation_refuses(override, said, refused):
    assert said in refused("segmentation", override)


@pytest.mark.parametrize("task", TASKS)
def test_weights_that_are_not_there_or_are_none_are_refused(task, refused, tmp_path):
    assert (
        f"no weights to start from; add --weights PATH (a run's folder, a checkpoint or a file of weights), or {task}"
        in (refused(task, start=()))
    )
    assert f"{task}.weights=gone (--weights) does not exist" in refused(task, start=("weights=gone",))
    (tmp_path / "text.pth").write_text("no weights")
    assert "text.pth was refused: it is damaged, or holds more than tensors" in refused(
        task, start=(f"weights={tmp_path}/text.pth",)
    )


def many(about, change):
    for one in about["annotations"]:
        change(one)


CONTRADICTIONS = {
    "category that does not exist": (lambda one: one.update(category_id=99), "category_id 99 does not exist"),
    "image that does not exist": (lambda one: one.update(image_id=9999), "image_id 9999 does not exist"),
    "box outside": (lambda one: one.update(bbox=[40, 40, 30, 30]), "px out of the image of 48 x 48 px"),
    "polygon of two points": (lambda one: one.update(segmentation=[[1, 1, 5, 5]]), "a polygon has 4 coordinates"),
    "mask of another size": (
        lambda one: one["segmentation"].update(size=[48, 50]),
        "its mask is of [48, 50] (height, width) px, its image of [48, 48]",
    ),
}


@pytest.mark.parametrize(("change", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictory_annotations_are_named_counted_and_refused_above_the_limit(change, said, refused, changed):
    line = refused("detection", changed(lambda about: many(about, change)))
    assert said in line
    assert f"allowed are 0 (detection.bad_annotation_limit=0.001 of {TRAIN} images)" in line
    assert "contradicts itself or the images" in line


def test_images_that_are_all_named_otherwise_are_refused(refused, changed):
    def rename(about):
        for image in about["images"]:
            image["file_name"] = f"train/{image['file_name']}"

    assert "none of the 30 images" in refused("detection", changed(rename))


def test_validation_of_other_categories_or_without_images_is_refused(refused, changed):
    path = changed(lambda about: about["categories"].pop()).partition("=")[2]
    assert "the detector 10 (0, 1, 2, ...); give annotations of the same categories" in refused(
        "detection", f"detection.val_annotations={path}", "detection.bad_annotation_limit=1"
    )


def test_label_maps_that_are_missing_are_named(refused, scenes, tmp_path):
    (tmp_path / "labels").mkdir()
    for number in range(TRAIN - 1):
        Image.new("L", (48, 48), 1).save(tmp_path / "labels" / f"{number:06d}.png")
    line = refused("segmentation", f"segmentation.labels={tmp_path}/labels")
    assert "1 of 30 images have no label map" in line
    assert "000029.png" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["detection/demo", "--set", "imagenet-a"], "--set imagenet-a is of a classifier"),
        (["detection/demo", "--predictions", "x.txt"], "--predictions x.txt: expected a name that ends in .json"),
        (["segmentation/demo", "--predictions", "no/where"], "--predictions no/where: expected a folder"),
        (["segmentation/demo", "--figure", "x.jpg"], "--figure x.jpg: expected a name that ends in .png"),
        (["finetune/demo", "--figure", "x.png"], "--figure and --predictions are of detectors and segmenters"),
        (["pretrain/vit_base_800ep"], "the recipe's task is mae, expected classification, detection, segmentation"),
        (["demo", "--weights", "x"], "--weights x: the recipe's task is mae, which starts from none"),
        (["detection/demo"], "detection.weights is not set; add --weights PATH"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(words, said, call):
    code, _, error = call("evaluate", *words)
    assert code == 2
    assert said in error


def test_an_encoder_has_nothing_to_evaluate(mae_scale, scenes, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / "encoder.safetensors")
    ended = mae_scale(
        "evaluate", "detection/demo", "--weights", tmp_path / "encoder.safetensors",
        f"data.val_root={scenes}/val/images",
        f"detection.val_annotations={scenes}/val/instances.json",
    )  # fmt: skip
    assert ended.returncode == 2
    assert "holds an encoder, expected a detector; train one first, and give that run" in ended.stderr


def test_a_json_without_images_and_label_maps_of_two_images_are_refused(refused, changed, scenes, tmp_path):
    assert "none of the 30 images" in refused(
        "detection", changed(lambda about: about.update(images=[], annotations=[]))
    )
    (tmp_path / "images").mkdir()
    for name in ("000000.jpg", "000000.png", "000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg"):
        Image.new("RGB", (48, 48)).save(tmp_path / "images" / name)
    line = refused("segmentation", f"data.root={tmp_path}/images")
    assert "000000.png would be the label map of two images" in line


def test_images_without_objects_or_with_crowds_alone_are_left_out_of_training(scenes, changed, call, tmp_path):
    def strip(about):
        about["annotations"] = [one for one in about["annotations"] if one["image_id"] not in (3, 4)]
        for one in about["annotations"]:
            one["iscrowd"] = int(one["image_id"] == 5)

    words = [*arguments("detection", scenes), "detection.from_scratch=true", changed(strip)]
    code, out, error = call("finetune", *words, "--out", tmp_path / "out", "--dry-run")
    assert code == 0, error
    assert f"{TRAIN - 3} images" in out
