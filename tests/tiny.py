"""A run small enough for tests: the demo's recipe on the digits, a few thousand parameters, each step logged."""

import json
from pathlib import Path

import torch

from mae_scale.checkpoints.shards import ShardReader
from mae_scale.tracking.metrics_log import read_metrics

TINY = [
    "data.global_batch=120",  # divides by 1, 2 and 3 ranks
    "optim.base_lr=2e-3",
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "tracking.log_every_steps=1",
]
STEPS_PER_EPOCH = 1442 // 120
STEPS = 2 * STEPS_PER_EPOCH


def arguments(digits: Path, *more: str) -> list[str]:
    """Overrides of the tiny run on the digits."""
    return [f"data.root={digits}/train", f"data.val_root={digits}/val", *TINY, *more]


def losses(out: Path) -> dict[int, float]:
    """{step: loss} of a run's metrics.jsonl, which must have each step once and in order."""
    rows = read_metrics(out / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), steps
    return {row["step"]: row["train/loss"] for row in rows}


def events(out: Path) -> list[tuple[str, int, str | None]]:
    """(event, step, reason) of a run's events.jsonl."""
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [(row["event"], row["step"], row.get("reason")) for row in rows]


def stored(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """{parameter: its values, flat} of a part of the state in a checkpoint's folder, such as `weight`."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    with ShardReader(checkpoint / name for name in files) as reader:
        names = [name for name in reader.names if name.startswith(f"{part}/")]
        return {name.partition("/")[2]: reader.whole(name) for name in names}
