"""Places of the packaged files that are not code: DeepSpeed files and Slurm templates."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def packaged(folder: str) -> Path:
    """Return the folder `ds_configs` or `slurm`: inside the package where it is installed, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder
