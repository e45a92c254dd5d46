"""What happens to detection and segmentation of two ranks: killed in the middle, annotations damaged while they run."""

import json

import pytest
from PIL import Image

from mae_scale.tracking.metrics_log import read_metrics
from tests.dense import STEPS_PER_EPOCH, TASKS, arguments, scenes_in
from tests.faults.harness import Training, newest_whole_step
from tests.tiny import losses

pytestmark = pytest.mark.timeout(600)

EPOCHS = 6
MORE = [
    f"schedule.epochs={EPOCHS}",
    "checkpoint.every_steps=4",
    "engine.zero_stage=2",
    "tracking.evaluate_every_epochs=6",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scenes_in(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def start(scenes):
    def run(task, out, *more, log=None, nproc=2):
        words = [*arguments(task, scenes), f"{task}.from_scratch=true", *MORE, *more]
        return Training(out, "finetune", *words, "--nproc", nproc, log=log)

    return run


@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_a_run_that_is_killed_has_the_curve_of_the_uninterrupted_one(task, start, tmp_path):
    with start(task, tmp_path / "whole") as training:
        assert training.wait() == 0, training.text()
    with start(task, tmp_path / "run", log="killed") as training:
        training.wait_until(lambda: newest_whole_step(tmp_path / "run") >= 8)
        training.kill_all()
    step = newest_whole_step(tmp_path / "run")
    assert 8 <= step < EPOCHS * STEPS_PER_EPOCH
    with start(task, tmp_path / "run") as training:
        assert training.wait() == 0, training.text()
    assert f"going on from step {step}\n" in training.text()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "whole"))
    assert ours == theirs


def test_a_label_map_that_is_damaged_while_training_is_named_replaced_and_counted(start, scenes, tmp_path):
    copied = scenes_in(tmp_path)
    for number in (3, 4):
        Image.new("L", (48, 48), 200).save(copied / "train" / "labels" / f"{number:06d}.png")
    labels = f"segmentation.labels={copied}/train/labels"
    with start("segmentation", tmp_path / "run", labels, "data.bad_image_limit=0.1") as training:
        assert training.wait() == 0, training.text()
    assert "label map 000003.png has the value 200; expected at most 11" in training.text()
    assert sum(row.get("data/replaced_images", 0) for row in read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 10
    with start("segmentation", tmp_path / "stops", labels, "data.bad_image_limit=0.01") as training:
        assert training.wait() == 1, training.text()
    assert "000003.jpg" in training.text()
    assert "Traceback" not in training.text()


def test_other_annotations_than_a_run_was_begun_with_are_refused(start, scenes, tmp_path):
    """Also where the run keeps what it needs: a file that was mended would not be learnt from."""
    about = json.loads((scenes / "train" / "instances.json").read_text())
    about["annotations"][0]["bbox"][2] -= 1
    (tmp_path / "mended.json").write_text(json.dumps(about))
    copied = scenes_in(tmp_path)
    Image.new("L", (48, 48), 1).save(copied / "train" / "labels" / "000005.png", compress_level=0)
    for task, override, said in (
        ("detection", f"detection.annotations={tmp_path}/mended.json", "is another file than the run in"),
        ("segmentation", f"segmentation.labels={copied}/train/labels", "holds other label maps than the run in"),
    ):
        with start(task, tmp_path / task, "schedule.stop_after_steps=2", nproc=1) as training:
            assert training.wait() == 0, training.text()
        with start(task, tmp_path / task, override, log=f"{task}_other", nproc=1) as training:
            assert training.wait() == 2, training.text()
        assert said in training.text()


def test_a_validation_image_that_turns_bad_is_left_out_of_numbers_and_figures(start, tmp_path):
    copied = scenes_in(tmp_path)
    images = f"data.val_root={copied}/val/images"
    limit = "data.bad_image_limit=0.2"
    for task in TASKS:
        out = tmp_path / task
        with start(task, out, images, limit, "schedule.stop_after_steps=2", nproc=1) as training:
            assert training.wait() == 0, training.text()
    (copied / "val" / "images" / "000000.jpg").write_bytes(bytes(900))  # it is one of those that are drawn
    for task in TASKS:
        out = tmp_path / task
        with start(task, out, images, limit, log=f"{task}_again", nproc=2) as training:
            assert training.wait() == 0, training.text()
        found = json.loads((out / "evaluation.json").read_text())
        assert (found["images"], found["left_out"]) == (6, 1)
        assert Image.open(out / "figures" / "predictions.png").size[0] > 500
