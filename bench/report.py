"""How figures are shown, and what they were taken on."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def show(head: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column to the left, the others to the right."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [head, *(r for r in rows if r[1])]) for i in range(len(head))]
        for row in [head, *rows]:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            print("  ".join(cells).rstrip())
        return
    table = Table(box=box.SIMPLE)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A file or a pipe has no width: take what the table needs.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)


def machine(device: torch.device) -> dict:
    """What the figures were taken on and with."""
    packages = ("torch", "timm", "transformers", "triton", "numpy")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
