"""The figure of a segmenter's predictions for some of the images that it is measured on."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.arrays import Uint8Array
from data_pipeline.index import Index
from mae_scale.reports.dense import classes_figure
from mae_scale.tasks.segmentation.label_files import LabelFiles
from mae_scale.tasks.stored_pictures import stored_pictures


def draw_classes(
    index: Index, labels: LabelFiles, predicted: dict[int, Uint8Array], names: list[str], path: Path
) -> None:
    """Write a PNG of images, their label maps, and what was predicted for them, by their rows in the index."""
    pictures = stored_pictures(index, sorted(predicted))
    classes_figure(
        list(pictures.values()),
        [labels.read(row) for row in pictures],
        [predicted[row] for row in pictures],
        path,
        names=names,
    )
