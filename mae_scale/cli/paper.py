"""The command that asks whether the paper's findings hold on images of one's own: `mae-scale paper`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mae_scale.cli.options import Overrides, can_be_stopped

paper_app = typer.Typer()


@paper_app.command()
@can_be_stopped
def paper(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs and the page; what is done stays.")],
    overrides: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Images, resized to 32 px: train/ and val/, each with a folder per class. Without it the digits.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Number of seeds, from 0 on.")] = 3,
    epochs: Annotated[int, typer.Option(metavar="N", min=4, help="Epochs of the base pre-training.")] = 20,
    labels: Annotated[int, typer.Option(metavar="N", min=1, help="Labels per class in fine-tuning and probing.")] = 10,
    finding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Only this finding, such as mask-ratio; may be repeated.", show_default="all"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Runs side by side.", show_default="one per core; with a GPU, which all share, 4"
        ),
    ] = None,
) -> None:
    """Run the comparisons of the MAE paper in small, and say of each finding whether it shows here.

    Mask ratio, decoder, targets, augmentation, masks, schedule, size, partial fine-tuning, labels, BEiT and MoCo v3:
    each an ordinary run per seed, a child of one run in MLflow. The same command goes on where it was cut off.

    Example: `mae-scale paper --out paper`, or `mae-scale paper --data cifar10 --out paper --epochs 4 --labels 100`
    """
    import torch

    from mae_scale.reproduce.paper.command import run_paper, scale_of
    from mae_scale.reproduce.paper.findings import findings_named

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several run side by side
    cores = len(os.sched_getaffinity(0))
    side_by_side = jobs or (min(4, cores) if torch.cuda.is_available() else cores)
    findings = findings_named(finding or ())
    scale = scale_of(data, out, epochs=epochs, labels=labels, findings=findings, overrides=tuple(overrides or ()))
    run_paper(scale, seeds=seeds, jobs=side_by_side)
