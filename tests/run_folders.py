"""Folders of runs as training leaves them, written without training: for reports on many runs, or on odd ones."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_scale.config.load import load_recipe

START = {"step": 0, "event": "start", "world_size": 2, "engine": "deepspeed ZeRO 2", "time": 1000.0}
DONE = {"step": 100, "event": "end", "reason": "done", "time": 1400.0}


def rows_of(count: int, *, epochs: float = 20, offset: float = 0.0) -> list[dict[str, Any]]:
    """Return logged rows with the metrics that a run has, validation in every tenth."""
    rows = []
    for number in range(1, count + 1):
        row = {
            "step": number,
            "epoch": epochs * number / count,
            "time": 1000.0 + number,
            "train/loss": 0.4 + offset + math.exp(-5 * number / count),
            "train/lr": 1e-3 * number / count,
            "train/grad_norm": 0.5 + (number % 7) / 10,
            "perf/images_per_second": 300.0 + number % 5,
            "perf/step_time_s": 0.4,
            "perf/data_wait_s": 0.01,
        }
        if number % 10 == 0:
            row |= {"val/loss": row["train/loss"] + 0.05, "val/knn_top1": 50 + 30 * number / count}
        rows.append(row)
    return rows


def put_run(
    folder: Path,
    *overrides: str,
    recipe: str = "demo",
    rows: Sequence[dict[str, Any]] = (),
    events: Sequence[dict[str, Any]] = (START, DONE),
) -> Path:
    """Write the folder of a run of a packaged recipe: recipe.yaml, metrics.jsonl and events.jsonl."""
    folder.mkdir(parents=True)
    load_recipe(recipe, ["schedule.epochs=20", *overrides]).save(folder / "recipe.yaml")
    for name, lines in (("metrics", rows), ("events", events)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
