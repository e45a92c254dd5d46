"""`mae-scale doctor`: what is installed, which devices, what will be used."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, distributions, version

import typer

PACKAGES = ("torch", "torchvision", "deepspeed", "fairscale", "timm", "mlflow", "safetensors")


doctor_app = typer.Typer()


@doctor_app.command()
def doctor() -> None:
    """Show what is installed, which devices there are and what will be used.

    Example: `mae-scale doctor`
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", "what it means", box=None, title_justify="left")
    table.add_row("Python", platform.python_version(), "")
    for package in PACKAGES:
        table.add_row(
            package, _version(package), "" if importlib.util.find_spec(package) else "missing: pip install it"
        )
    dali = [d for d in distributions() if d.metadata["Name"].startswith("nvidia-dali")]
    table.add_row(
        "DALI",
        ", ".join(f"{d.metadata['Name']} {d.version}" for d in dali) or "missing",
        "" if dali else "pip install 'mae-scale[cuda13]' (or cuda12)",
    )
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for number, gpu in enumerate(gpus):
        table.add_row(f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", "bf16, DALI decodes on it")
    if not gpus:
        table.add_row("GPU", "none", "fp32 on the CPU, DALI decodes on the CPU, ranks talk through Gloo")
    elif torch.distributed.is_nccl_available():
        table.add_row("NCCL", ".".join(map(str, torch.cuda.nccl.version())), "ranks talk through it")
    cores = len(os.sched_getaffinity(0))
    table.add_row("CPU cores", str(cores), f"--nproc 2 gives each rank {max(1, cores // 2)} thread(s)")
    compiler = shutil.which("g++")
    table.add_row(
        "C++ compiler",
        compiler or "missing",
        "" if compiler else "apt-get install g++, for engine.compile=true on a CPU",
    )
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    table.add_row("MLflow", uri or "no MLFLOW_TRACKING_URI", "used" if uri else "SQLite file beside the output folder")
    Console().print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
