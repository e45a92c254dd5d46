"""What ran: the versions of the code and its libraries, and the settings that a start has really used."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mae_scale
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.dali_graph import decoding_device, import_dali
from mae_scale.config.schema import Recipe
from mae_scale.engines.deepspeed_templates import zero_stage_of
from mae_scale.engines.policy import compiles, precision_of


def settings_used(recipe: Recipe, layout: BatchLayout, device: torch.device) -> dict[str, str | int | bool]:
    """Return, by recipe key, what this start uses where the recipe leaves it to the machine or another key decides."""
    gpu = device.type == "cuda"
    stage = zero_stage_of(recipe)
    return {
        "engine.precision": precision_of(recipe, gpu),
        "engine.micro_batch": layout.micro_batch,
        "engine.compile": compiles(recipe, stage, gpu),
        "engine.zero_stage": stage,
        "data.device": "cpu" if decoding_device(recipe.data.device) == "cpu" else "gpu",
    }


def describe_settings(used: dict[str, Any]) -> str:
    """Return them for people, without what the headline says anyway."""
    compiled = "compiled" if used["engine.compile"] else "not compiled"
    return f"{used['engine.precision']}, blocks {compiled}, images decoded on the {used['data.device'].upper()}"


def versions() -> dict[str, str | None]:
    """Return the version of the code that runs and of each library that computes; None for what is not installed."""
    found: dict[str, str | None] = {"mae-scale": mae_scale.__version__}
    for name in ("torch", "deepspeed", "fairscale"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["dali"] = import_dali().__version__  # its distribution has another name for each CUDA
    return found


def git_commit(file: Path = Path(mae_scale.__file__)) -> str | None:
    """Return the commit of the repository that tracks a file of the code; None where it runs from no repository.

    An installed copy may lie inside a repository of the user's, which says nothing about it.
    """
    if shutil.which("git") is None:
        return None
    for question in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
        asked = subprocess.run(["git", "-C", str(file.parent), *question], capture_output=True, text=True)
        if asked.returncode:
            return None
    return asked.stdout.strip()


def environment(facts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return where and with what a start runs, for its event. facts: what its checkpoints say."""
    return {
        "host": platform.node(),
        "device": _device_name(device),
        "git_commit": git_commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "versions": facts["versions"],
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def start_tags(facts: dict[str, Any], device: torch.device, unreadable: int) -> dict[str, str | int | None]:
    """Return the MLflow tags of a start. facts: what its checkpoints say; unreadable: images left out of its index."""
    engine, slurm = facts["engine"], os.environ
    return {
        **{f"version.{name}": found for name, found in facts["versions"].items()},
        "git_commit": git_commit(),
        "host": platform.node(),
        "world_size": facts["world_size"],
        "engine": engine,
        "zero_stage": engine.rpartition(" ")[2] if "ZeRO" in engine else None,
        "device": _device_name(device),
        "slurm_job_id": slurm.get("SLURM_JOB_ID"),
        "slurm_array_job_id": slurm.get("SLURM_ARRAY_JOB_ID"),
        "slurm_restart_count": slurm.get("SLURM_RESTART_COUNT"),
        "slurm_nodes": slurm.get("SLURM_JOB_NUM_NODES"),
        "unreadable_images": unreadable,
        "mae_scale.started_from_run": (facts.get("started_from") or {}).get("mlflow_run_id"),
    }
