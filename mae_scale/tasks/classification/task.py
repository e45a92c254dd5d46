"""Everything after pre-training as a job: fine-tuning, partial fine-tuning, linear probing, supervised from scratch."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from data_pipeline.index import Index, load_index
from mae_scale.checkpoints.export import FROZEN, checkpoint_model, export_weights, starting_point, weights_of
from mae_scale.checkpoints.shards import digest_of
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.distributed.collectives import first_then_others
from mae_scale.engines.deepspeed_config import BatchLayout
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.errors import RunError, UsageError
from mae_scale.files import write_atomically, write_json
from mae_scale.models.attention import last_attention
from mae_scale.models.build import build_classifier_of
from mae_scale.models.classifier import Classifier
from mae_scale.models.weights.autoencoder import LoadReport
from mae_scale.models.weights.classifier import load_classifier
from mae_scale.planning.flops import vit_forward_macs
from mae_scale.reports.classification import attention_figure, per_class_figure
from mae_scale.reports.style import pictures_of
from mae_scale.tasks.classification.datasets import EvaluationSet, folder_set
from mae_scale.tasks.classification.measure import measure, report
from mae_scale.tasks.classification.objective import Classify
from mae_scale.tracking.mlflow_models import keep_classifier
from mae_scale.tracking.tracker import Tracking
from mae_scale.training.inputs import VALIDATION, has_checkpoint, refuse_other_weights, started_from
from mae_scale.training.loop import Run
from mae_scale.training.run import Job
from mae_scale.training.shown_images import shown_images

EVALUATION = "evaluation.json"
FIGURE_IMAGES = 8


class Finetuning(Job):
    """A classifier is trained on labels, all of it or a part."""

    _source: Path | None = None  # the file or the checkpoint that this start has taken its weights from

    def refuse(self, layout: BatchLayout) -> None:
        section = self.recipe.classifier
        if section is None:
            raise UsageError("the recipe has no section classifier: it pre-trains; use `mae-scale pretrain` for it")
        with torch.device("meta"):
            build_classifier_of(self.recipe, 2)
        begun = has_checkpoint(self.out)  # then the weights that it started from are not needed
        if section.weights is None and not section.from_scratch and not begun:
            raise UsageError(
                "no weights to start from; add --weights PATH (a run's folder, a checkpoint or a file of weights), "
                "or classifier.from_scratch=true"
            )
        if section.weights is not None and not section.weights.exists() and not begun:
            raise UsageError(
                f"classifier.weights={section.weights} (--weights) does not exist; give a folder or a file of weights"
            )
        if (section.mixup or section.cutmix) and layout.micro_batch % 2:
            raise UsageError(
                f"mixup and cutmix mix neighbours, and a rank's micro-batch is {layout.micro_batch} images; "
                "choose an even engine.micro_batch (or data.global_batch), or classifier.mixup=0 classifier.cutmix=0"
            )
        if section.batch_norm and layout.accumulation > 1:
            raise UsageError(
                f"classifier.batch_norm takes its statistics from the whole global batch, and this layout cuts it into "
                f"{layout.accumulation} steps; drop engine.micro_batch: a frozen encoder keeps nothing for a backward "
                "pass, so a rank's whole share fits"
            )

    def choose_images(self, index: Index) -> Index:
        unlabelled = int((index.label < 0).sum())
        if unlabelled:
            raise UsageError(
                f"{unlabelled:,} of the {len(index):,} images in {index.root} have no label; expected a folder a class "
                "(or a .cls member beside each image of a shard)"
            )
        labels = self.recipe.data.labels_a_class
        return index if labels is None else index.few(labels, seed=self.recipe.seed)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        if validation is not None:
            folder_set(validation, num_classes=len(images.classes), class_names=images.classes)
        path = self.recipe.classifier.weights
        if path is None:
            return
        if has_checkpoint(self.out):
            refuse_other_weights(path, self.out)
            return
        with torch.device("meta"):
            model = build_classifier_of(self.recipe, len(images.classes))
        load_weights(model, starting_point(path))

    def objective(self, index: Index) -> Classify:
        model = build_classifier_of(self.recipe, len(index.classes))
        begun = has_checkpoint(self.out)
        if self.recipe.classifier.weights is not None and not begun:
            first_then_others(lambda: self._start_from(model))
        if self.recipe.classifier.trained_blocks is not None:
            first_then_others(lambda: self._keep_frozen(model, begun))
            try:
                model.load_state_dict(load_file(self.out / FROZEN), strict=False)
            except SafetensorError as error:
                raise RunError(
                    f"{self.out / FROZEN}, the weights that the run does not train, is damaged ({error}); remove it, "
                    "it is written again from --weights",
                    on_all_ranks=True,
                ) from None
        return Classify(model, self.recipe.classifier, seed=self.recipe.seed)

    def facts(self, index: Index) -> dict:
        frozen = self.out / FROZEN
        # Only what rank 0 says of the weights is written down, and to read them all takes long.
        first = torch.distributed.get_rank() == 0
        return {
            "classes": index.classes,
            "frozen": digest_of(frozen) if frozen.exists() else None,
            "started_from": started_from(self.out, self._source) if first else None,
        }

    def training_flops(self) -> int:
        """Of one image; a frozen part has no backward pass (He et al., partial fine-tuning)."""
        model, trained = self.recipe.model, self.recipe.classifier.trained_blocks
        sizes = {"image_size": model.image_size, "patch_size": model.patch_size, "width": model.width}
        whole = vit_forward_macs(model.name, depth=model.depth, **sizes)
        if trained is None:
            return 2 * 3 * whole
        with torch.device("meta"):
            depth = len(build_classifier_of(self.recipe, 2).encoder.blocks)
        none = vit_forward_macs(model.name, depth=0, **sizes)
        return int(2 * (whole + 2 * (whole - none) * trained / depth))

    def evaluator(self, run: Run, engine, tracking: Tracking) -> "Validation | None":
        if run.recipe.data.val_root is None:
            return None
        validation = load_index(run.out / VALIDATION, run.recipe.data.val_root)
        classes = run.index.classes
        return Validation(run, engine, folder_set(validation, num_classes=len(classes), class_names=classes))

    def finish(self, run: Run, tracking: Tracking) -> str:
        weights = run.out / "export" / "model.safetensors"
        trained = cache(lambda: checkpoint_model(list_checkpoints(run.checkpoints)[-1][1])[0])
        if not weights.exists():
            for picture in draw_figures(trained(), run):
                tracking.artifact(picture, "figures")
            export_weights(trained(), weights, "official")
        if tracking.mlflow is not None:
            keep_classifier(
                tracking.mlflow,
                run.out,
                lambda: (trained(), np.rint(255 * pictures_of(shown_images(run, 1)))),
                class_names=run.index.classes,
                registered_name=self.recipe.tracking.registered_model,
            )
        said = f"weights in {weights}"
        if (run.out / EVALUATION).exists():
            found = json.loads((run.out / EVALUATION).read_text())
            said = f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % of {found['images']:,} images; {said}"
        return said

    def describe(self, objective: Classify) -> list[str]:
        """What is trained, and with layer-wise decay each layer's share of the learning rate."""
        total = sum(p.numel() for p in objective.parameters())
        groups = parameter_groups(objective, self.recipe.optim)
        trained = sum(p.numel() for group in groups for p in group["params"])
        said = [f"{trained:,} of {total:,} parameters are trained, for {objective.model.classes} classes"]
        if self.recipe.optim.layer_decay < 1:
            said += [
                f"  {group['name']:24}  lr x {group['lr_scale']:.4f}  weight decay {group['weight_decay']:<5g}"
                f"{sum(p.numel() for p in group['params']):>12,} parameters"
                for group in groups
            ]
        return said

    def _start_from(self, model: Classifier) -> None:
        """Load the recipe's weights, and note what of them was used."""
        path = self.recipe.classifier.weights
        self._source = starting_point(path)
        loaded = load_weights(model, self._source)
        fresh = f"; fresh: {_places(loaded.not_set)}" if loaded.not_set else ""
        unused = f"; unused: {_places(loaded.unused)}" if loaded.unused else ""
        self.notes.append(f"{len(loaded.loaded)} tensors from {path}{fresh}{unused}")

    def _keep_frozen(self, model: Classifier, begun: bool) -> None:
        """What is not trained: into the folder of the run, once; from there every rank and start reads it."""
        file = self.out / FROZEN
        # Without a checkpoint nothing has counted on the file: it may be of an older state of --weights.
        if file.exists() and (begun or torch.distributed.get_rank() > 0):
            return
        if begun:  # lost: what is read anew must have the digest that the checkpoints know
            weights = self.recipe.classifier.weights
            if weights is None or not weights.exists():
                raise UsageError(
                    f"{file}, the weights that the run does not train, is lost; restore it, or add --weights PATH with "
                    "the weights that the run was begun with: it is written again from them"
                )
            self._start_from(model)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        write_atomically(file, save({name: t for name, t in model.state_dict().items() if name in frozen}))


class Probing(Finetuning):
    """Fine-tuning of the head alone."""

    def refuse(self, layout: BatchLayout) -> None:
        section = self.recipe.classifier
        if section is not None and section.trained_blocks != 0:
            raise UsageError(
                "linear probing trains the head alone (classifier.trained_blocks=0), and the recipe trains more; "
                "use a recipe such as probe/vit_large, or `mae-scale finetune`"
            )
        super().refuse(layout)


class Validation:
    """Top-1 and top-5 on data.val_root every so many epochs and at the end; the last one is kept as a JSON file."""

    def __init__(self, run: Run, engine, one: EvaluationSet):
        self._run, self._engine, self._set = run, engine, one

    def due(self, done: int) -> bool:
        every = self._run.recipe.classifier.evaluate_every_epochs * self._run.steps_per_epoch
        return done % every == 0 or done == self._run.total_steps

    def __call__(self, done: int) -> dict[str, float]:
        run, names = self._run, self._run.index.classes
        with self._engine.averaged():
            accuracy = measure(
                self._engine.predict, self._set, run.recipe, classes=len(names), ranks=run.ranks, device=run.device
            )
        if run.ranks.is_first:
            write_json(run.out / EVALUATION, report(accuracy, names, self._set.index))
        found = accuracy.results()
        return {"val/top1": found["top1"], "val/top5": found["top5"], "val/loss": found["loss"]}


def load_weights(model: Classifier, source: Path) -> LoadReport:
    """Load a file's or a checkpoint's weights; UsageError when they do not fit."""
    loaded = load_classifier(model, weights_of(source))
    if "pos_embed" in loaded.not_set:
        raise UsageError(
            f"{source} has no positions, so the image size that it was trained at is not known; "
            "write it anew with `mae-scale export --format official`"
        )
    return loaded


def draw_figures(model: Classifier, run: Run) -> list[Path]:
    """Where the model looks, and the accuracy of each class where it was measured; the pictures' files."""
    figures = run.out / "figures"
    pictures = [figures / "attention.png"]
    images = shown_images(run, FIGURE_IMAGES)
    attention_figure(images, last_attention(model, images), pictures[0], model.patch_size)
    if (run.out / EVALUATION).exists():
        pictures.append(figures / "per_class.png")
        per_class_figure(json.loads((run.out / EVALUATION).read_text()), pictures[1])
    return pictures


def _places(names: list[str]) -> str:
    """Names of tensors, told shortly by their first parts and how many there are of each."""
    parts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in parts.items())
