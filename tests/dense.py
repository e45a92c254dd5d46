"""Detection and segmentation small enough for tests: scenes of digits, a few thousand parameters, each step logged."""

from pathlib import Path

from data_pipeline.scenes import write_scenes

TRAIN, VAL, SIDE = 30, 7, 48
TASKS = ("detection", "segmentation")
MODEL = ["model.image_size=32", "model.patch_size=8", "model.width=32", "model.depth=4", "model.heads=2"]
TINY = {
    "detection": ["detection.channels=8", "detection.sampled_boxes=16", "detection.window=2"],
    "segmentation": ["segmentation.channels=8", "segmentation.auxiliary_channels=4"],
}
STEPS_PER_EPOCH = TRAIN // 6
STEPS = 2 * STEPS_PER_EPOCH


def scenes_in(folder: Path) -> Path:
    """Write the scenes; return their folder."""
    return write_scenes(folder / "scenes", train=TRAIN, val=VAL, side=SIDE)


def annotated(task: str, scenes: Path) -> list[str]:
    """The overrides that name a task's images and annotations."""
    found = [f"data.root={scenes}/train/images", f"data.val_root={scenes}/val/images"]
    if task == "detection":
        return [
            *found,
            f"detection.annotations={scenes}/train/instances.json",
            f"detection.val_annotations={scenes}/val/instances.json",
        ]
    return [
        *found,
        f"segmentation.labels={scenes}/train/labels",
        f"segmentation.val_labels={scenes}/val/labels",
        f"segmentation.class_names={scenes}/classes.txt",
    ]


def arguments(task: str, scenes: Path, *more: str) -> list[str]:
    """The recipe and the overrides of a tiny run of a task; the batch divides by 1, 2 and 3 ranks."""
    return [
        f"{task}/demo",
        "--tracking-uri",
        "off",
        *annotated(task, scenes),
        *MODEL,
        *TINY[task],
        f"{task}.pretraining_size=32",
        "model.drop_path=0.1",
        "data.global_batch=6",
        "data.fraction=null",
        "schedule.epochs=2",
        "schedule.warmup_epochs=0.5",
        "checkpoint.every_epochs=1",
        *(["schedule.shape=steps", "schedule.step_epochs=[1.5]"] if task == "detection" else []),
        "optim.base_lr=0.05",
        "tracking.log_every_steps=1",
        "tracking.evaluate_every_epochs=2",
        *more,
    ]
