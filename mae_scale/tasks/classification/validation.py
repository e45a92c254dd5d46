"""The accuracy on data.val_root while a classifier is trained."""

from data_pipeline.files import write_json
from mae_scale.engines.base import Engine
from mae_scale.tasks.classification.datasets import EvaluationSet
from mae_scale.tasks.classification.measure import measure, report
from mae_scale.training.context import RunContext

EVALUATION = "evaluation.json"
"""The last evaluation of a run, in its folder."""


class Validation:
    """An evaluator: top-1 and top-5 every tracking.evaluate_every_epochs and at the end; keeps the last as JSON."""

    def __init__(self, context: RunContext, engine: Engine, images: EvaluationSet):
        self._context, self._engine, self._images = context, engine, images

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        context, names = self._context, self._context.index.classes
        with self._engine.averaged():
            accuracy = measure(
                self._engine.predict,
                self._images,
                context.recipe,
                classes=len(names),
                ranks=context.ranks,
                device=context.device,
            )
        if context.ranks.is_first:
            write_json(context.out / EVALUATION, report(accuracy, names, self._images.index))
        found = accuracy.results()
        return {"val/top1": found["top1"], "val/top5": found["top5"], "val/loss": found["loss"]}
