"""The commands that measure and draw without training: evaluate, knn, features, reconstruct, partial-curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from mae_scale.cli.json_file import Json, check_json, write_figures
from mae_scale.cli.options import (
    Nproc,
    Overrides,
    RecipeName,
    Weights,
    can_be_stopped,
    read_recipe,
    with_weights,
)
from mae_scale.cli.relaunch import relaunch, starts_ranks

measure_app = typer.Typer()
Results = TypeVar("Results")


@measure_app.command()
@can_be_stopped
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    weights: Weights = None,
    kind: Annotated[
        str,
        typer.Option(
            "--set",
            metavar="KIND",
            help="folder, or a published layout: imagenet-a, imagenet-r, imagenet-sketch, imagenet-c.",
        ),
    ] = "folder",
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PNG to write: a detector's or a segmenter's predictions over images."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A detector's results to write, in COCO's format (.json), or a folder for a segmenter's PNGs.",
        ),
    ] = None,
    nproc: Nproc = 1,
    json: Json = None,
) -> None:
    """Measure a classifier, a detector or a segmenter on data.val_root, exact for any number of ranks.

    Top-1 and top-5; COCO's average precision of boxes and masks; mean intersection over union.

    Example: `mae-scale evaluate finetune/vit_base_224 --weights mae_finetuned_vit_base.pth
    data.val_root=/data/imagenet/val`
    """
    from mae_scale.tasks.evaluation import Asked
    from mae_scale.tasks.registry import evaluation_of

    loaded = read_recipe(recipe, with_weights(recipe, overrides, weights, trained=True))
    evaluation, asked = evaluation_of(loaded), Asked(kind, figure, predictions)
    evaluation.check(loaded, asked)
    check_json(json)
    results = _on_ranks(nproc, lambda: evaluation.evaluate(loaded, asked))
    if results is not None:
        write_figures(json, results)
        typer.echo(evaluation.describe(loaded, results))


@measure_app.command()
@can_be_stopped
def knn(
    recipe: RecipeName,
    overrides: Overrides = None,
    weights: Weights = None,
    k: Annotated[
        int, typer.Option("--k", metavar="N", min=1, help="Number of nearest training images that vote.")
    ] = 20,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PNG to write: some images and their nearest neighbours."),
    ] = None,
    nproc: Nproc = 1,
    json: Json = None,
) -> None:
    """Classify data.val_root's images by their k nearest neighbours in data.root, on frozen features.

    Example: `mae-scale knn probe/vit_large --weights runs/vit_large data.root=/data/imagenet/train
    data.val_root=/data/imagenet/val`
    """
    from mae_scale.tasks.classification import knn as evaluation

    loaded = read_recipe(recipe, with_weights(recipe, overrides, weights, trained=True))
    evaluation.check(loaded)
    check_json(json)
    results = _on_ranks(nproc, lambda: evaluation.nearest_neighbours(loaded, k, figure))
    if results is not None:
        write_figures(json, results)
        typer.echo(
            f"{k} nearest neighbours: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % "
            f"of {results['images']:,} images"
        )


@measure_app.command()
def reconstruct(
    recipe: RecipeName,
    weights: Annotated[
        Path, typer.Option(metavar="PATH", help="A pre-training run's folder, or a file with a decoder.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG to write.")],
    overrides: Overrides = None,
) -> None:
    """Draw an autoencoder's reconstructions of images with most patches removed.

    Example: `mae-scale reconstruct pretrain/vit_large_800ep --weights mae_visualize_vit_large.pth --out faces.png
    data.val_root=photos model.target=pixels`
    """
    from mae_scale.tasks.mae.reconstruct import reconstruct as draw

    draw(read_recipe(recipe, overrides), weights, out)
    typer.echo(f"{out}")


@measure_app.command()
@can_be_stopped
def features(
    recipe: RecipeName,
    weights: Annotated[
        Path, typer.Option(metavar="PATH", help="A run's folder, a checkpoint, or a file of weights in any layout.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Safetensors file to write.")],
    overrides: Overrides = None,
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="Features: cls, mean (of the patch tokens) or patch.")
    ] = "cls",
    nproc: Nproc = 1,
) -> None:
    """Write a frozen encoder's features of data.root's images, with labels and names, in the index's order.

    Example: `mae-scale features probe/vit_large --weights runs/vit_large --out features.safetensors --nproc 8
    data.root=/data/imagenet/val`
    """
    from mae_scale.tasks import features as work

    loaded = read_recipe(recipe, overrides)
    wanted = work.check(loaded, weights, out, kind)
    shape = _on_ranks(nproc, lambda: work.write_features(loaded, weights, out, wanted))
    if shape is not None:
        typer.echo(f"{out}: features {' x '.join(f'{size:,}' for size in shape)} ({kind})")


@measure_app.command("partial-curve")
def partial_curve(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of finished runs, with any seeds.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG to write.")],
    json: Json = None,
) -> None:
    """Draw accuracy against the number of trained blocks, from runs of probing, partial and full fine-tuning.

    Example: `mae-scale partial-curve runs/probe runs/partial_1 runs/partial_4 runs/finetune --out curve.png`
    """
    from mae_scale.tasks.classification.partial_curve import partial_curve as draw

    check_json(json)
    points = draw(runs, out)
    for point in points:
        std = "" if point["std"] is None else f" +- {point['std']:.2f} ({point['runs']} runs)"
        typer.echo(f"{point['trained_blocks']:g} blocks: top-1 {point['top1']:.2f} %{std}")
    typer.echo(f"{out}")
    write_figures(json, points)


def _on_ranks(nproc: int, work: Callable[[], Results | None]) -> Results | None:
    """Return the results of `work` on this rank, or None where local ranks, started here, did it or another reports."""
    if starts_ranks(nproc):
        if code := relaunch(nproc):
            raise typer.Exit(code)
        return None
    return work()
