"""The average precision on data.val_root while a detector is trained."""

from data_pipeline.files import write_json
from mae_scale.engines.base import Engine
from mae_scale.tasks.detection.evaluation_set import DetectionSet
from mae_scale.tasks.detection.figure import draw_detections
from mae_scale.tasks.detection.measure import detections, measure
from mae_scale.tasks.evaluation import EVALUATION
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext

RESULTS = "detections.json"
"""The detections of the last evaluation, in a run's folder, in COCO's format of results."""
TRACKED = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}


class AveragePrecision:
    """An evaluator: AP of boxes and masks every tracking.evaluate_every_epochs and at the end; keeps the last as JSON.

    val/box_ap and val/mask_ap are COCO's AP in percent, mean over IoU 0.5 to 0.95; ...50 and ...75 at one IoU. At the
    end of the schedule it draws detections over some images.
    """

    def __init__(self, context: RunContext, engine: Engine, tracker: Tracker, images: DetectionSet):
        self._context, self._engine, self._tracker, self._images = context, engine, tracker, images

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        context = self._context
        seen = detections(
            self._engine.predict, self._images, context.recipe, ranks=context.ranks, device=context.device
        )
        found = measure(seen, self._images)
        if context.ranks.is_first:
            write_json(context.out / RESULTS, seen.results)
            write_json(context.out / EVALUATION, found)
            if done == context.steps.total:
                picture = context.out / "figures" / "predictions.png"
                draw_detections(self._images, seen.results, picture)
                self._tracker.artifact(picture, "figures")
        return {
            f"val/{kind}_{name}": found[kind][measured]
            for kind in ("box", "mask")
            for name, measured in TRACKED.items()
            if found[kind][measured] is not None
        }
