"""`mae-scale paper`: the paper's comparisons in small, on the user's images, under several seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mae_scale
from data_pipeline.errors import UsageError
from data_pipeline.files import write_atomically, write_json
from data_pipeline.index_build import open_index
from data_pipeline.samples import write_digits
from mae_scale.config.load import load_recipe
from mae_scale.distributed.stop_requests import passing_on
from mae_scale.reports.paper import ClaimBar, paper_figure
from mae_scale.reproduce.paper.findings import SPEED, Finding
from mae_scale.reproduce.paper.page import Found, as_json, look_up, markdown, summary
from mae_scale.reproduce.paper.runs import SWEEP, Run, Scale, check_runs, do, images_per_second, runs_of, top1
from mae_scale.reproduce.paper.verdict import OPPOSITE, SAME, UNDECIDED
from mae_scale.tracking.mlflow_sweep import MlflowSweep, SweepResults

JSON, PAGE, FIGURE, KEPT = "paper.json", "paper.md", "paper.png", "comparison.json"
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
    """Return the scale of the comparison on a folder's images, or on the digits; raise UsageError for other folders."""
    if data is None:
        data = write_digits(out / "digits")
    for part in ("train", "val"):
        if not (data / part).is_dir():
            raise UsageError(
                f"--data {data} has no folder {part}; expected train/ and val/, each with a folder per class"
            )
    index = open_index(data / "train")
    if len(index.classes) < 2:
        raise UsageError(f"--data {data}/train has {len(index.classes)} classes; expected a folder per class")
    scale = Scale(data, out, epochs, labels, len(index), len(index.classes), index.digest(), findings, overrides)
    _refuse_another(scale)
    return scale


def _refuse_another(scale: Scale) -> None:
    """Raise UsageError when the folder holds runs of other images or settings."""
    path, meant = scale.out / KEPT, scale.kept()
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else meant
    except ValueError as error:
        raise UsageError(f"{path} cannot be read ({error}); choose another --out") from None
    different = [f"{key}: {kept.get(key)} -> {value}" for key, value in meant.items() if kept.get(key) != value]
    if different:
        raise UsageError(f"--out {scale.out} holds another comparison ({'; '.join(different)}); choose another --out")


def run_paper(scale: Scale, *, seeds: int, jobs: int) -> None:
    """Do the runs that are not done, seed after seed; write the page after each seed.

    Raises UsageError for what can be refused before a run is started, RunError when a run fails, SystemExit(75) when
    asked to stop; the same command goes on.
    """
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    for seed in range(seeds):
        check_runs(runs_of(scale, seed))
    scale.out.mkdir(parents=True, exist_ok=True)
    write_json(scale.out / KEPT, scale.kept())
    tracking = load_recipe("paper/mae", list(scale.overrides)).tracking
    mlflow = MlflowSweep.of(tracking, scale.runs, SWEEP, None)
    scale.runs.mkdir(parents=True, exist_ok=True)
    mlflow.claim()
    for seed in range(seeds):
        runs = runs_of(scale, seed)
        names: list[str] = []

        def told(run: Run, names: list[str] = names, seed: int = seed, total: int = len(runs)) -> None:
            names.append(run.name)
            minutes = (time.monotonic() - began) / 60
            console.print(f"seed {seed} of {seeds}: {len(names)}/{total} {run.name}  ({minutes:.0f} min)")

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
    about = {
        "version": mae_scale.__version__,
        "images": scale.images,
        "classes": scale.classes,
        "epochs": scale.epochs,
        "labels_per_class": scale.labels,
        "overrides": list(scale.overrides),
        "seeds": seeds,
    }
    said = (
        f"{scale.images:,} training images of {scale.classes} classes, {scale.epochs} epochs of pre-training, "
        f"{scale.labels} labels per class, seeds 0 to {seeds - 1}; top-1 on the validation images in percent, mean ± "
        "standard deviation over the seeds."
    )
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
