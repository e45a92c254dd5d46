"""The work of `mae-scale checkpoints`: list, verify and prune a run's checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.checkpoints.store import (
    Damaged,
    Retention,
    beyond,
    damaged_folders,
    list_checkpoints,
    newest_whole,
    partial_folders,
    read_manifest,
    remove,
    size_of,
    verify,
)
from mae_scale.human_units import duration


def checkpoints_of(path: Path) -> Path:
    """Return a run's folder of checkpoints, given it or the run's folder. Raises UsageError when there is none."""
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder) or damaged_folders(folder) or partial_folders(folder):
            return folder
    what = "has no checkpoints yet" if path.is_dir() else "is not a folder"
    raise UsageError(f"{path} {what}; expected the --out of a run, or its folder checkpoints")


def verify_sizes(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest after comparing the sizes of its files, which is quick. Raises Damaged."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != expected["bytes"]:
            raise Damaged(f"{name} has {found:,} bytes" if found is not None else f"{name} is missing")
    return manifest


def print_table(checkpoints: Path, check: Callable[[Path], dict[str, Any]]) -> bool:
    """Print a line per checkpoint: step, epoch, age, size, writer, and its damage; return whether all are whole.

    check is `verify_sizes` or `verify` (reads and compares every byte).
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("step", "epoch", "age", "size", "loss", "ranks"):
        table.add_column(title, justify="right")
    for title in ("written by", "whole"):
        table.add_column(title)
    damages = []
    for step, folder in list_checkpoints(checkpoints):
        size = f"{size_of(folder) / 2**20:,.1f} MiB"
        try:
            m = check(folder)
        except Damaged as damage:
            damages.append(f"{folder.name}: {damage}")
            age = duration(time.time() - folder.stat().st_mtime)
            table.add_row(*(f"{step:,}", "", age, size, "", "", "", "[red]no[/]"))
            continue
        loss = "" if m["loss"] is None else f"{m['loss']:.4f}"
        whole = "yes" if check is verify else "yes (sizes)"
        age, ranks = duration(time.time() - m["time"]), str(m["world_size"])
        table.add_row(*(f"{step:,}", f"{m['epoch']:.2f}", age, size, loss, ranks, m["engine"], whole))
    console = Console(highlight=False)
    console.print(table)
    for line in damages:
        console.print(line, soft_wrap=True, markup=False)
    for folder in damaged_folders(checkpoints):
        console.print(f"{folder.name}: set aside, it did not verify", soft_wrap=True)
    for folder in partial_folders(checkpoints):
        console.print(f"{folder.name}: being written now, or left by a save that never ended", soft_wrap=True)
    return not damages


def best_by(checkpoints: Path) -> str:
    """Return the metric by which the run keeps its best checkpoint; train/loss where it keeps none."""
    for _, folder in reversed(list_checkpoints(checkpoints)):
        with contextlib.suppress(Damaged):
            kept = read_manifest(folder)["recipe"]["checkpoint"].get("keep_best")
            return kept if isinstance(kept, str) else "train/loss"  # true in manifests of older versions
    return "train/loss"


def prune(checkpoints: Path, retention: Retention) -> list[Path]:
    """Remove checkpoints that the retention does not keep, and unfinished saves; return the folders removed.

    The newest checkpoint that verifies is always kept. Raises RunError, and removes nothing, when there is none.
    """
    whole, _ = newest_whole(checkpoints)
    gone = [folder for folder in beyond(checkpoints, retention) if folder != whole] + partial_folders(checkpoints)
    for folder in gone:
        remove(folder)
    return gone
