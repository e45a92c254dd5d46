"""`mae-scale paper`: the paper's comparisons in small, on the user's images, under several seeds."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mae_scale
from data_pipeline.errors import UsageError
from data_pipeline.files import write_atomically, write_json
from data_pipeline.index_build import open_index
from data_pipeline.samples import write_digits
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import FREE_KEYS, FREE_SECTIONS
from mae_scale.distributed.ranks import launched
from mae_scale.distributed.stop_requests import passing_on
from mae_scale.reports.paper import ClaimBar, paper_figure
from mae_scale.reproduce.paper.findings import FINDINGS, SPEED, TRANSFERS, Finding
from mae_scale.reproduce.paper.page import Found, as_json, look_up, markdown, summary
from mae_scale.reproduce.paper.runs import Scale, images_per_second, runs_of, top1, words_used
from mae_scale.reproduce.paper.verdict import OPPOSITE, SAME, UNDECIDED
from mae_scale.reproduce.runs import Run, check_runs, do
from mae_scale.tasks.classification.datasets import folder_set, refuse_unlabelled
from mae_scale.tracking.mlflow_sweep import MlflowSweep, SweepResults, check_name

JSON, PAGE, FIGURE, KEPT = "paper.json", "paper.md", "paper.png", "comparison.json"
OURS = {
    *("data.root", "data.val_root", "data.index", "classifier.weights", "tokeniser.weights", "tokeniser.tokens"),
    *("schedule.stop_after_steps", "tracking.sweep", "tracking.run_name", "tracking.evaluate_every_epochs"),
}
"""Keys that are set for each run."""
HOLDS = {SAME: True, OPPOSITE: False, UNDECIDED: None}


def scale_of(
    data: Path | None,
    out: Path,
    *,
    epochs: int,
    labels: int,
    findings: tuple[Finding, ...],
    overrides: tuple[str, ...],
) -> Scale:
    """Return the scale of the comparison on a folder's images, or on the digits.

    Raises UsageError for a folder that cannot be compared on, for an `out` whose name no sweep can have, and for
    overrides that would change what is compared.
    """
    try:
        check_name(out.absolute().name)
    except UsageError as error:
        raise UsageError(f"--out {out}: {error}") from None
    for word in overrides:
        key = word.partition("=")[0]
        if key in OURS or not (key in FREE_KEYS or key.startswith(FREE_SECTIONS)):
            raise UsageError(
                f"{key}: what is compared is fixed; only settings that change no result can be given, "
                "such as engine.precision, data.threads or tracking.uri"
            )
    if data is None:
        data = write_digits(out / "digits")
    for part in ("train", "val"):
        if not (data / part).is_dir():
            raise UsageError(
                f"--data {data} has no folder {part}; expected train/ and val/, each with a folder per class"
            )
    train, val = open_index(data / "train"), open_index(data / "val")
    refuse_unlabelled(train)
    folder_set(val, num_classes=len(train.classes), class_names=train.classes)
    smallest, batch = int(np.bincount(train.label).min()), load_recipe("paper/mae").data.global_batch
    if smallest < labels or len(train) < batch or len(train.classes) < 2:
        raise UsageError(
            f"--data {data}/train has {len(train)} images of {len(train.classes)} classes, the smallest of {smallest}; "
            f"expected at least {batch} images of two classes, and --labels {labels} of each"
        )
    scale = Scale(data, out, epochs, labels, len(train), len(train.classes), smallest, findings, overrides)
    same = {"images": train.digest(), "val_images": val.digest(), "epochs": epochs, "labels": labels}
    keep(scale, {**same, "recipes": _digest(scale)})
    return scale


def _digest(scale: Scale) -> str:
    """Return a digest of what the runs of all findings compute, whatever their length, labels and seed."""
    alike = replace(scale, epochs=20, labels=1, findings=FINDINGS, overrides=())
    recipes = "".join(run.name + run.recipe().digest() for run in runs_of(alike, 0))
    return hashlib.sha256(recipes.encode()).hexdigest()[:16]


def keep(scale: Scale, meant: dict[str, Any]) -> None:
    """Write what all runs in the folder have in common. Raises UsageError when it holds runs of something else."""
    path = scale.out / KEPT
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UsageError(f"{path} cannot be read ({error}); choose another --out") from None
    different = [f"{key}: {kept.get(key)} -> {value}" for key, value in meant.items() if kept.get(key) != value]
    if different and scale.runs.exists():
        raise UsageError(f"--out {scale.out} holds another comparison ({'; '.join(different)}); choose another --out")
    try:
        scale.out.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": uuid.uuid4().hex, **kept, **meant})
    except OSError as error:
        raise UsageError(f"--out {scale.out} cannot be written to: {error.strerror}") from None


def run_paper(scale: Scale, *, seeds: int, jobs: int) -> None:
    """Do the runs that are not done, seed after seed; write the page after each seed.

    Raises UsageError for what can be refused before a run is started, RunError when a run fails, SystemExit(75) when
    asked to stop; the same command goes on.
    """
    if launched():
        raise UsageError("paper starts its runs itself, one rank each; start it once, without srun or torchrun")
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    for seed in range(seeds):
        check_runs(runs_of(scale, seed))
    tracking = load_recipe("paper/mae", list(scale.overrides)).tracking
    key = json.loads((scale.out / KEPT).read_text(encoding="utf-8"))["key"]
    mlflow = MlflowSweep.of(tracking, scale.runs, scale.sweep, key)
    scale.runs.mkdir(parents=True, exist_ok=True)
    mlflow.claim()
    for seed in range(seeds):
        runs = runs_of(scale, seed)
        names: list[str] = []

        def told(run: Run, names: list[str] = names, seed: int = seed, total: int = len(runs)) -> None:
            names.append(run.name)
            minutes = (time.monotonic() - began) / 60
            console.print(f"seed {seed} ({seed + 1} of {seeds}): {len(names)}/{total} {run.name}  ({minutes:.0f} min)")

        with passing_on("what runs is ended with a checkpoint, and the same command goes on"):
            do(runs, jobs, told)
        write_page(scale, seed + 1, mlflow, console)
    console.print(f"({(time.monotonic() - began) / 60:.0f} min in all)")


def write_page(scale: Scale, seeds: int, mlflow: MlflowSweep, console: Console) -> None:
    """Write the table as JSON, Markdown and a figure, print it, and show it in MLflow."""

    @cache
    def value(seed: int, pretraining: str, measure: str) -> float:
        if measure == SPEED:
            return images_per_second(scale, seed, pretraining)
        return top1(scale, seed, pretraining, measure)

    found = look_up([partial(value, seed) for seed in range(seeds)], scale.findings)
    few, more, many = labels = [scale.labels_per_class(n) for n in sorted({one.labels for one in TRANSFERS.values()})]
    about: dict[str, Any] = {
        "version": mae_scale.__version__,
        "images": scale.images,
        "classes": scale.classes,
        "epochs": scale.epochs,
        "labels_per_class": labels,
        "seeds": seeds,
    }
    said = (
        f"{scale.images:,} training images of {scale.classes} classes, {scale.epochs} epochs of pre-training, "
        f"{few} labels per class ({more} with 4 x, {many} with 16 x the labels: at most those of the smallest class), "
        f"seeds 0 to {seeds - 1}; top-1 on the validation images in percent, mean ± standard deviation over the seeds."
    )
    used = [share for seed in range(seeds) if (share := words_used(scale, seed)) is not None]
    if used:
        about["words_used"] = used
        said += f" The tokenisers use {', '.join(f'{share:.0%}' for share in used)} of their words."
    write_json(scale.out / JSON, as_json(found, about))
    text = markdown(found, [said])
    write_atomically(scale.out / PAGE, f"{text}\n![{FIGURE}]({FIGURE})\n".encode())
    paper_figure(_bars(found), scale.out / FIGURE)
    table = Table(title=f"The paper's findings in small, seeds 0 to {seeds - 1}", title_justify="left")
    columns = ("finding", "claim", "paper", "here", "verdict")
    for column in columns:
        table.add_column(column)
    rows = summary(found)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{scale.out / PAGE}, {JSON}, {FIGURE}")
    cells = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
    mlflow.publish(
        SweepResults(text, [scale.out / FIGURE], {"paper_table.json": cells}, "FINISHED", [scale.out / FIGURE])
    )


def _bars(found: Sequence[Found]) -> list[ClaimBar]:
    """Return the claims about accuracy; those about speed are in per cent."""
    return [
        ClaimBar(f"{one.finding.title}: {claim.text}", verdict.mean, verdict.margin, HOLDS[verdict.word])
        for one in found
        for claim, verdict in zip(one.finding.claims, one.verdicts, strict=True)
        if claim.unit == "points"
    ]
