"""The commands that measure and draw without training: evaluate, knn, features, reconstruct, partial-curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

import typer

from mae_scale.cli.options import (
    Json,
    Nproc,
    Overrides,
    RecipeName,
    Weights,
    can_be_stopped,
    check_file,
    read_recipe,
    with_weights,
    write_text,
)

if TYPE_CHECKING:
    from mae_scale.config.schema import Recipe

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
    nproc: Nproc = 1,
    json: Json = None,
) -> None:
    """Top-1 and top-5 of a classifier on data.val_root, exact for any number of ranks.

    Example: `mae-scale evaluate finetune/vit_base_224 --weights mae_finetuned_vit_base.pth
    data.val_root=/data/imagenet/val`
    """
    from mae_scale.tasks.classification import evaluate as evaluation

    overrides = with_weights(overrides, weights)
    loaded = _measured(evaluation.check, recipe, overrides, json)
    words = ["evaluate", recipe, *overrides, "--set", kind]
    results = _on_ranks(words, nproc, json, lambda: evaluation.evaluate(loaded, kind))
    if results is not None:
        typer.echo(evaluation.describe(results, loaded.data.val_root))


@measure_app.command()
@can_be_stopped
def knn(
    recipe: RecipeName,
    overrides: Overrides = None,
    weights: Weights = None,
    k: Annotated[int, typer.Option("--k", metavar="N", min=1, help="Nearest training images that vote.")] = 20,
    figure: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="PNG of some images and their nearest."),
    ] = None,
    nproc: Nproc = 1,
    json: Json = None,
) -> None:
    """k-NN on frozen features: data.val_root's images classified by the nearest of data.root.

    Example: `mae-scale knn probe/vit_large --weights runs/vit_large data.root=/data/imagenet/train
    data.val_root=/data/imagenet/val`
    """
    from mae_scale.tasks.classification import knn as evaluation

    overrides = with_weights(overrides, weights)
    loaded = _measured(evaluation.check, recipe, overrides, json)
    words = ["knn", recipe, *overrides, "--k", str(k), *(["--figure", str(figure)] if figure else [])]
    results = _on_ranks(words, nproc, json, lambda: evaluation.nearest_neighbours(loaded, k, figure))
    if results is not None:
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
    """Draw what an autoencoder makes of images with most patches removed.

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
    kind: Annotated[str, typer.Option(metavar="KIND", help="cls, mean (of the patch tokens), or patch.")] = "cls",
    nproc: Nproc = 1,
) -> None:
    """Write what a frozen encoder makes of data.root's images: features, labels and names in the index's order.

    Example: `mae-scale features probe/vit_large --weights runs/vit_large --out features.safetensors --nproc 8
    data.root=/data/imagenet/val`
    """
    from mae_scale.tasks import features as work

    loaded = read_recipe(recipe, overrides)
    work.check(loaded, weights, out, kind)
    words = ["features", recipe, *(overrides or []), "--weights", str(weights), "--out", str(out), "--kind", kind]
    shape = _on_ranks(words, nproc, None, lambda: work.write_features(loaded, weights, out, kind))
    if shape is not None:
        typer.echo(f"{out}: features {' x '.join(f'{size:,}' for size in shape)} ({kind})")


@measure_app.command("partial-curve")
def partial_curve(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of finished runs, of any seeds.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG to write.")],
    json: Json = None,
) -> None:
    """Draw accuracy by the number of trained blocks, from runs of probing, partial and full fine-tuning.

    Example: `mae-scale partial-curve runs/probe runs/partial_1 runs/partial_4 runs/finetune --out curve.png`
    """
    import json as text

    from mae_scale.tasks.classification.partial_curve import partial_curve as draw

    points = draw(runs, out)
    for point in points:
        std = "" if point["std"] is None else f" +- {point['std']:.2f} ({point['runs']} runs)"
        typer.echo(f"{point['trained_blocks']:g} blocks: top-1 {point['top1']:.2f} %{std}")
    typer.echo(f"{out}")
    if json is not None:
        write_text(json, text.dumps(points, indent=1) + "\n")


def _measured(check: Callable[[Recipe], None], recipe: str, overrides: list[str], json: Path | None) -> Recipe:
    """Return the recipe of something to measure, checked."""
    loaded = read_recipe(recipe, overrides)
    check(loaded)
    check_file("--json", json)
    return loaded


def _on_ranks(words: list[str], nproc: int, json: Path | None, work: Callable[[], Results | None]) -> Results | None:
    """Return what `work` gives as this rank, or run the command `words` on local ranks; None where another says it."""
    import json as text

    from mae_scale.distributed.ranks import launched
    from mae_scale.launch.local import launch_local_ranks

    if nproc > 1 and not launched():
        if code := launch_local_ranks(nproc, [*words, *(["--json", str(json)] if json else [])]):
            raise typer.Exit(code)
        return None
    results = work()
    if results is not None and json is not None:
        write_text(json, text.dumps(results, indent=1) + "\n")
    return results
