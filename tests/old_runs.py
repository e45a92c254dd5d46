"""Runs that an earlier version began: how they were made, kept in tests/data, and are unpacked.

Each was stopped in the middle and is kept as its folder at that moment (without figures) in an archive, with the
metrics of a run that nobody stopped as `expected.jsonl`. To keep runs of another version, check it out, put this file
there and call `python -m tests.old_runs FOLDER`.
"""

import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

BEFORE_THE_MOVE = Path(__file__).parent / "data" / "before_the_move"
FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11.2, Debian 12's, has no filters yet."""

SIZE = ["model.width=16", "model.depth=2", "model.heads=2"]
DECODER = ["model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2"]
STEP_BY_STEP = ["schedule.warmup_epochs=1", "tracking.log_every_steps=1"]
PRETRAIN = [*SIZE, *DECODER, *STEP_BY_STEP, "data.global_batch=120", "schedule.epochs=2", "optim.base_lr=2e-3"]
FINETUNE = [*SIZE, *STEP_BY_STEP, "data.global_batch=20", "schedule.epochs=3", "model.drop_path=0.2"]
FINETUNE += ["data.augmentation=rand_augment", "data.random_erasing=0.25", "classifier.mixup=0.8"]
FINETUNE += ["classifier.cutmix=1.0", "classifier.ema=0.9", "tracking.evaluate_every_epochs=1"]

RUNS = {
    "pretrain_one_rank": (["pretrain", "demo", *PRETRAIN], 1, 8),
    "pretrain_two_ranks": (["pretrain", "demo", *PRETRAIN, "engine.zero_stage=3", "engine.micro_batch=30"], 2, 8),
    "finetune_one_rank": (["finetune", "finetune/demo", *FINETUNE], 1, 7),
    "finetune_two_ranks": (["finetune", "partial/demo", *FINETUNE, "engine.zero_stage=2"], 2, 7),
}
"""{name: (command, ranks, the step at which it was stopped)}; the fine-tunings start from `pretrain_one_rank`."""


def command(name: str, out: Path, digits: Path, ranks: int | None = None) -> list[str]:
    """Return the arguments that begin or go on with a run in `out`; ranks: other than it was begun with."""
    words, nproc, _ = RUNS[name]
    where = ["--out", out, "--nproc", ranks or nproc, "--tracking-uri", "off"]
    return [*map(str, [*words[:2], *where, f"data.root={digits}/train", f"data.val_root={digits}/val", *words[2:]])]


def unpack(name: str, folder: Path) -> tuple[Path, Path]:
    """Unpack a run of BEFORE_THE_MOVE into `folder`; return its own folder and the file of expected metrics."""
    with tarfile.open(BEFORE_THE_MOVE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, **FILTER)
    return folder / name, folder / "expected.jsonl"


def this_machine() -> str:
    """Return what the last digits of a loss depend on: the CPU's instructions and torch."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def make(folder: Path) -> None:
    """Make all of RUNS with the version that is checked out, and keep them in `folder`."""
    work = Path(tempfile.mkdtemp(prefix="old_runs_"))
    call = [sys.executable, "-m", "mae_scale"]
    subprocess.run([*call, "data", "sample", work / "digits"], check=True)
    for name, (words, _, stop) in RUNS.items():
        weights = ["--weights", str(work / "whole" / "pretrain_one_rank")] if words[0] == "finetune" else []
        for kind, more in {"whole": [], "stopped": [f"schedule.stop_after_steps={stop}"]}.items():
            run = command(name, work / kind / name, work / "digits")
            subprocess.run([*call, *run, *weights, *more], check=True)
        stopped = work / "stopped" / name
        shutil.rmtree(stopped / "figures")
        with tarfile.open(folder / f"{name}.tar.xz", "w:xz") as archive:
            archive.add(stopped, name)
            archive.add(work / "whole" / name / "metrics.jsonl", "expected.jsonl")
    (folder / "machine.txt").write_text(this_machine() + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
