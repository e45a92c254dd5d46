"""The recipe of a run: its sections, and which keys may differ between two starts of one run."""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from data_pipeline.files import write_atomically
from mae_scale.config.section import Section
from mae_scale.config.sections import (
    CheckpointSection,
    DataSection,
    EngineSection,
    ModelSection,
    OptimSection,
    ScheduleSection,
    TrackingSection,
)
from mae_scale.config.task_sections import (
    ClassifierSection,
    DetectionSection,
    MocoSection,
    SegmentationSection,
    StartSection,
    TokeniserSection,
)


class Recipe(Section):
    """A complete training run."""

    task: str = Field(
        "mae",
        description="mae (masked autoencoder), beit, moco (MoCo v3), dvae (discrete VAE), classification, detection "
        "(Mask R-CNN) or segmentation (UperNet)",
    )
    seed: int = Field(0, ge=0, description="seed of weights, order, augmentation, masks and mixing")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    classifier: ClassifierSection | None = None
    detection: DetectionSection | None = None
    segmentation: SegmentationSection | None = None
    moco: MocoSection | None = None
    tokeniser: TokeniserSection | None = None
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _task_of_old_recipes(cls, tree: Any) -> Any:
        """Add the task to a recipe written before the key existed: classification if it has the section classifier."""
        if isinstance(tree, dict) and "task" not in tree and tree.get("classifier") is not None:
            return {**tree, "task": "classification"}
        return tree

    @model_validator(mode="before")
    @classmethod
    def _settings_of_moco(cls, tree: Any) -> Any:
        """Add the section moco, with its defaults, to a recipe of that task without it."""
        if isinstance(tree, dict) and tree.get("task") == "moco" and tree.get("moco") is None:
            return {**tree, "moco": {}}
        return tree

    @property
    def contrast(self) -> MocoSection:
        """The section moco; TypeError where the task has none."""
        if self.moco is None:
            raise TypeError(f"a recipe with task: {self.task} has no section moco")
        return self.moco

    @property
    def classification(self) -> ClassifierSection:
        """The section classifier; TypeError where the task has none."""
        if self.classifier is None:
            raise TypeError(f"a recipe with task: {self.task} has no section classifier")
        return self.classifier

    @property
    def detecting(self) -> DetectionSection:
        """The section detection; TypeError where the task has none."""
        if self.detection is None:
            raise TypeError(f"a recipe with task: {self.task} has no section detection")
        return self.detection

    @property
    def segmenting(self) -> SegmentationSection:
        """The section segmentation; TypeError where the task has none."""
        if self.segmentation is None:
            raise TypeError(f"a recipe with task: {self.task} has no section segmentation")
        return self.segmentation

    @property
    def start(self) -> StartSection | None:
        """The section with the starting weights; None where the task starts from none."""
        section: StartSection | None = getattr(self, STARTING.get(self.task, ""), None)
        return section

    @property
    def tokenisation(self) -> TokeniserSection:
        """The section tokeniser; TypeError where the task has none."""
        if self.tokeniser is None:
            raise TypeError(f"a recipe with task: {self.task} has no section tokeniser")
        return self.tokeniser

    @property
    def lr(self) -> float:
        """The peak learning rate: base_lr x global_batch / 256 (the paper's linear scaling)."""
        return self.optim.base_lr * self.data.global_batch / 256

    def flat(self) -> dict[str, Any]:
        """Return {"section.key": value} with every default resolved; paths as text."""
        return _flatten(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Return a digest of all keys that decide what is computed; the same for every start of one run."""
        return hashlib.sha256(json.dumps(_computed(self.flat()), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the recipe as YAML with every default resolved, atomically: other ranks may be reading it."""
        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False).encode())


STARTING = {"classification": "classifier", "detection": "detection", "segmentation": "segmentation"}
"""Of the tasks that start from weights: the section that names them."""
DENSE = ("detection", "segmentation")
"""Tasks that learn from annotated images, and not from a label of each."""
TASKS_WITH_SECTION = {
    "classifier": ("classification",),
    "detection": ("detection",),
    "segmentation": ("segmentation",),
    "moco": ("moco",),
    "tokeniser": ("dvae", "beit", "mae"),
}
"""Of the sections that not all tasks have: those that do."""

# What may differ between one start of a run and the next, for it does not change what is computed. Paths are among it:
# images are known by their index's digest, starting weights and tokenisers by their own (training.inputs).
FREE_SECTIONS = ("engine.", "checkpoint.", "tracking.")
FREE_KEYS = {
    "schedule.stop_after_steps",
    "data.root",
    "data.val_root",
    "data.index",
    "classifier.weights",
    "detection.weights",
    "detection.annotations",
    "detection.val_annotations",
    "detection.bad_annotation_limit",
    "segmentation.bad_annotation_limit",
    "segmentation.weights",
    "segmentation.labels",
    "segmentation.val_labels",
    "segmentation.class_names",
    "segmentation.evaluation",
    "segmentation.stride",
    "tokeniser.weights",
    "tokeniser.tokens",
    "data.threads",
    "data.device",
    "data.cache",
    "data.cache_gib",
}


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """Return the keys that would change what is computed, each as "section.key: old -> new"."""
    before, after = _computed(old.flat()), _computed(new.flat())
    keys = dict.fromkeys([*before, *after])
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _computed(flat: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat.items() if not k.startswith(FREE_SECTIONS) and k not in FREE_KEYS}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def keys() -> dict[str, FieldInfo]:
    """Return {"section.key": its field} for all keys of a recipe."""
    found: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        found |= {f"{name}.{key}": inner for key, inner in keys_of(name).items()} or {name: field}
    return found


def takes_text(key: str) -> bool:
    """Return whether a key, such as data.root, takes a path or a text of any kind."""
    field = keys().get(key)
    return field is not None and not {str, Path}.isdisjoint(get_args(field.annotation) or (field.annotation,))


def keys_of(section: str) -> dict[str, FieldInfo]:
    """Return the keys of a section and their fields; none for what is no section."""
    field = Recipe.model_fields.get(section)
    annotations = (get_args(field.annotation) or (field.annotation,)) if field else ()
    sections = [a for a in annotations if isinstance(a, type) and issubclass(a, Section)]
    return dict(sections[0].model_fields) if sections else {}
