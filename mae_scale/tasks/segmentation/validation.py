"""The mean intersection over union on data.val_root while a segmenter is trained."""

from data_pipeline.arrays import Uint8Array
from data_pipeline.files import write_json
from data_pipeline.index import Index
from mae_scale.distributed.collectives import from_all
from mae_scale.engines.base import Engine
from mae_scale.tasks.evaluation import EVALUATION
from mae_scale.tasks.segmentation.figure import draw_classes
from mae_scale.tasks.segmentation.label_files import LabelFiles
from mae_scale.tasks.segmentation.measure import measure, report
from mae_scale.tasks.stored_pictures import shown_rows
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext

TRACKED = ("mean_iou", "mean_accuracy", "pixel_accuracy")


class MeanIntersection:
    """An evaluator: val/mean_iou, val/mean_accuracy and val/pixel_accuracy in percent, every
    tracking.evaluate_every_epochs and at the end; keeps the last evaluation as JSON.

    At the end of the schedule it draws predictions for some images.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        tracker: Tracker,
        images: Index,
        labels: LabelFiles,
        names: list[str],
    ):
        self._context, self._engine, self._tracker = context, engine, tracker
        self._images, self._labels, self._names = images, labels, names
        self._shown = set(shown_rows(images))

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        context, kept = self._context, dict[int, Uint8Array]()

        def keep(image: int, predicted: Uint8Array) -> None:
            if image in self._shown:
                kept[image] = predicted

        counts = measure(
            self._engine.predict,
            self._images,
            self._labels,
            context.recipe,
            classes=len(self._names),
            ranks=context.ranks,
            device=context.device,
            take=keep,
        )
        if context.ranks.is_first:
            write_json(context.out / EVALUATION, report(counts, self._names, self._images))
        if done == context.steps.total:
            shown = {image: predicted for part in from_all(lambda: kept) for image, predicted in part.items()}
            if context.ranks.is_first:
                picture = context.out / "figures" / "predictions.png"
                draw_classes(self._images, self._labels, shown, self._names, picture)
                self._tracker.artifact(picture, "figures")
        found = counts.results()
        return {f"val/{name}": found[name] for name in TRACKED}
