"""The commands on data: `mae-scale data ...`."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import EXIT_FAILED, UsageError

data_app = typer.Typer(help="Index, verify and pack folders of images.")


@data_app.command("index")
def data_index(
    root: Annotated[Path, typer.Argument(help="A folder of images, or of tar shards.")],
    index: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Index file; default: beside the data."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of processes; default: one per core."),
    ] = None,
) -> None:
    """Build or refresh the index of a data folder, and list the images that cannot be read.

    Example: `mae-scale data index /data/imagenet/train`
    """
    from data_pipeline.index_build import open_index

    found = open_index(root, index, workers=workers)
    typer.echo("\n".join([found.summary(), *found.remarks.sentences()]))


@data_app.command("verify")
def data_verify(
    root: Annotated[Path, typer.Argument(help="A folder of images, or of tar shards.")],
    index: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Index file; default: beside the data."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image completely and strictly.")] = False,
) -> None:
    """Check every image, and the digests of packed shards; exit code 1 when some cannot be read or have changed.

    Example: `mae-scale data verify --deep /data/imagenet/train`
    """
    from data_pipeline.index_build import open_index
    from data_pipeline.pack_manifest import verify_pack
    from data_pipeline.verify_images import verify

    damaged = verify_pack(root)
    if damaged:
        for name, reason in damaged:
            typer.echo(f"{name}: {reason}")
        typer.echo(f"{len(damaged)} shards are damaged; run the same `mae-scale data pack` again to rewrite them")
        raise typer.Exit(EXIT_FAILED)
    found = open_index(root, index)
    bad = [*found.unreadable, *verify(found, deep=deep)]
    for name, reason in bad:
        typer.echo(f"{name}: {reason}")
    typer.echo(
        f"{len(found) + len(found.bad)} images, {len(bad)} bad"
        + ("" if deep else " (headers and ends only; --deep decodes)")
        + ("" if damaged is None else ", every shard has its digest")
    )
    for line in found.remarks.sentences():
        typer.echo(line)
    if bad:
        raise typer.Exit(EXIT_FAILED)


@data_app.command("pack")
def data_pack(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of images.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder, or that of an interrupted pack.")],
    shorter_side: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", min=1, help="Shrink larger images to this shorter side; default: keep the bytes."
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(metavar="Q", min=1, max=100, help="JPEG quality of shrunk images; default: 92."),
    ] = None,
    shard_mib: Annotated[int, typer.Option(metavar="N", min=1, help="Approximate size of a shard in MiB.")] = 256,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of processes; default: one per core."),
    ] = None,
) -> None:
    """Write a folder's images as WebDataset tar shards, with their index.

    With unchanged bytes, training from the shards equals training from the folder to the last bit. The same command
    continues an interrupted pack, and repairs what `mae-scale data verify DST` finds damaged.

    Example: `mae-scale data pack /data/imagenet/train /data/imagenet_shards/train --shorter-side 512 --quality 92`
    """
    from data_pipeline.packing import pack
    from data_pipeline.shrink_image import QUALITY, Shrinking

    if quality is not None and shorter_side is None:
        raise UsageError("--quality re-encodes nothing without --shorter-side; give both, or none to keep the bytes")
    shrinking = None if shorter_side is None else Shrinking(shorter_side, quality or QUALITY)
    index, left_out = pack(source, target, shrinking=shrinking, shard_mib=shard_mib, workers=workers)
    for name, reason in left_out:
        typer.echo(f"{name}: {reason}")
    typer.echo(index.summary() + (f", {len(left_out):,} unreadable images left out" if left_out else ""))
    for line in index.remarks.sentences():
        typer.echo(line)


@data_app.command("sample")
def data_sample(
    root: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Write scikit-learn's 1,797 handwritten digits as an image folder: train/ and val/, ten classes.

    Example: `mae-scale data sample digits`
    """
    from data_pipeline.samples import write_digits

    write_digits(root)
    typer.echo(f"{root}/train and {root}/val: scikit-learn's handwritten digits as JPEGs")


@data_app.command("scenes")
def data_scenes(
    root: Annotated[Path, typer.Argument(help="Folder to write.")],
    train: Annotated[int, typer.Option(metavar="N", min=1, help="Number of training scenes.")] = 1000,
    val: Annotated[int, typer.Option(metavar="N", min=1, help="Number of validation scenes.")] = 200,
    side: Annotated[int, typer.Option(metavar="PX", min=32, help="Side of a scene in pixels.")] = 128,
) -> None:
    """Write scenes for dense tasks: handwritten digits on photographs, with COCO's JSON and label maps.

    Example: `mae-scale data scenes scenes`
    """
    from data_pipeline.scenes import write_scenes

    write_scenes(root, train=train, val=val, side=side)
    typer.echo(
        f"{root}/train and {root}/val: {train:,} and {val:,} scenes of digits on photographs, {side} px; "
        "images/, labels/ (label maps) and instances.json (COCO's boxes and masks)"
    )
