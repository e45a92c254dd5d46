"""The runs that the findings need, under one seed: their recipes, their folders, what each waits for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import RunError
from mae_scale.config.load import load_recipe
from mae_scale.reproduce.paper.findings import (
    PRETRAININGS,
    SCRATCH,
    SPEED,
    TOKENISER,
    TRANSFERS,
    Finding,
    Pretraining,
)
from mae_scale.reproduce.runs import Run
from mae_scale.tasks.registry import task_of
from mae_scale.tracking.metrics_log import after_warm_up, read_metrics


@dataclass(frozen=True)
class Scale:
    """How large the small comparison is: where its images are, how long it trains, how many labels are few."""

    data: Path
    """A folder of train/ and val/, each with a folder per class."""
    out: Path
    epochs: int
    """Of the base schedule, in pre-training."""
    labels: int
    """Per class, in fine-tuning and probing."""
    images: int
    """Training images."""
    classes: int
    smallest_class: int
    findings: tuple[Finding, ...]
    overrides: tuple[str, ...] = ()

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def sweep(self) -> str:
        """The sweep in MLflow that all runs are children of."""
        return self.out.absolute().name

    def labels_per_class(self, multiple: int) -> int:
        """Return `multiple` times the few labels, as many as the smallest class has at most."""
        return min(multiple * self.labels, self.smallest_class)


def measured(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return each (pre-training, transfer) that the findings ask for, once."""
    pairs = ((arm.pretraining, measure) for one in findings for arm in one.arms for measure in one.measures)
    return [pair for pair in dict.fromkeys(pairs) if pair[1] != SPEED]


def runs_of(scale: Scale, seed: int) -> list[Run]:
    """Return the runs under a seed, each after those that it needs."""
    pairs = measured(scale.findings)
    pretrainings = [name for name in dict.fromkeys(name for name, _ in pairs) if name != SCRATCH]
    runs = []
    if any(PRETRAININGS[name].predicts_words for name in pretrainings):
        runs.append(_run(scale, seed, TOKENISER, "paper/tokeniser", ()))
    runs += [_pretraining(scale, seed, name, PRETRAININGS[name]) for name in pretrainings]
    runs += [_transfer(scale, seed, pretraining, transfer) for pretraining, transfer in pairs]
    return runs


def folder_of(scale: Scale, seed: int, name: str) -> Path:
    """Return the folder of a run; all lie side by side, and so share one MLflow database."""
    return scale.runs / f"{name}_seed-{seed}"


def transfer_name(pretraining: str, transfer: str) -> str:
    """Return the name of a transfer's run."""
    return f"{pretraining}.{transfer}"


def top1(scale: Scale, seed: int, pretraining: str, transfer: str) -> float:
    """Return a transfer's last top-1 on the validation images, percent. Raises RunError where there is none."""
    folder = folder_of(scale, seed, transfer_name(pretraining, transfer))
    found = [row["val/top1"] for row in read_metrics(folder / "metrics.jsonl") if "val/top1" in row]
    if not found:
        raise RunError(f"{folder} has no val/top1; remove it, and the same command does it again")
    return float(found[-1])


def images_per_second(scale: Scale, seed: int, pretraining: str) -> float:
    """Return the median rate of a pre-training's logged steps after its warm-up; of all where they are too few."""
    rows = read_metrics(folder_of(scale, seed, pretraining) / "metrics.jsonl")
    return statistics.median(row["perf/images_per_second"] for row in after_warm_up(rows) or rows)


def words_used(scale: Scale, seed: int) -> float | None:
    """Return the share, 0 to 1, of its words that the tokeniser uses on the validation images; None without one."""
    rows = read_metrics(folder_of(scale, seed, TOKENISER) / "metrics.jsonl")
    return next((row["val/words_used"] for row in reversed(rows) if "val/words_used" in row), None)


def _pretraining(scale: Scale, seed: int, name: str, asked: Pretraining) -> Run:
    epochs = max(1, round(scale.epochs * asked.share))
    overrides = [*asked.overrides, f"schedule.epochs={epochs}", f"schedule.warmup_epochs={0.1 * epochs:g}"]
    if asked.predicts_words:
        overrides.append(f"tokeniser.weights={folder_of(scale, seed, TOKENISER)}")
    return _run(scale, seed, name, asked.recipe, overrides, needs=(TOKENISER,) if asked.predicts_words else ())


def _transfer(scale: Scale, seed: int, pretraining: str, name: str) -> Run:
    """Return a transfer's run, of about as many updates whatever the number of labels."""
    transfer = TRANSFERS[name]
    recipe = "paper/scratch" if pretraining == SCRATCH else transfer.recipe
    loaded, labels = load_recipe(recipe), scale.labels_per_class(transfer.labels)
    few = scale.labels_per_class(1) * scale.classes
    batch = min(loaded.data.global_batch, few)
    updates = loaded.schedule.epochs * (few // batch)
    epochs = max(1, round(updates / (labels * scale.classes // batch)))
    overrides = [
        *transfer.overrides,
        f"data.labels_per_class={labels}",
        f"schedule.epochs={epochs}",
        f"schedule.warmup_epochs={0.1 * epochs:g}",
        f"data.global_batch={batch}",
    ]
    needs: tuple[str, ...] = ()
    if pretraining != SCRATCH:
        overrides += PRETRAININGS[pretraining].transfer
        overrides.append(f"classifier.weights={folder_of(scale, seed, pretraining)}")
        needs = (pretraining,)
    return _run(scale, seed, transfer_name(pretraining, name), recipe, overrides, needs=needs)


def _run(scale: Scale, seed: int, name: str, recipe: str, overrides: Sequence[str], needs: tuple[str, ...] = ()) -> Run:
    folder = folder_of(scale, seed, name)
    common = [
        f"data.root={scale.data / 'train'}",
        f"data.val_root={scale.data / 'val'}",
        f"seed={seed}",
        f"tracking.sweep={scale.sweep}",
        f"tracking.run_name={folder.name}",
    ]
    loaded = load_recipe(recipe)
    command = task_of(loaded, folder).command
    return Run(name, folder, (command, recipe, "--out", str(folder), *common, *overrides, *scale.overrides), needs)
