"""The commands: parse, call, print. Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 75 stopped on request."""

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mae_scale.errors import EXIT_FAILED, RunError, UsageError

app = typer.Typer(
    name="mae-scale",
    help="Masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="What images there are, and whether they can be read.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
    typer.Argument(metavar="[section.key=value ...]", help="Changes to the recipe.", show_default=False),
]


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A packaged name, such as pretrain/vit_huge_1600ep, or a path.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Output folder; a run found there goes on.")] = ...,
    nproc: Annotated[int, typer.Option(min=1, help="Local ranks to start when no launcher has.")] = 1,
    tracking_uri: Annotated[Optional[str], typer.Option(help="MLflow tracking URI; off: none.")] = None,  # noqa: UP045
) -> None:
    """Pre-train a masked autoencoder.

    Example: `mae-scale pretrain demo --nproc 2 --out runs/demo data.root=digits/train`
    """
    from mae_scale.recipe import load_recipe
    from mae_scale.training import pretrain as job
    from mae_scale.training.distributed import launch_local_ranks, launched

    overrides = list(overrides or [])
    if tracking_uri is not None:
        overrides.append(f"tracking.uri={tracking_uri}")
    loaded = load_recipe(recipe, overrides)
    if launched():
        job.check(loaded, out, int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))))
        job.pretrain(loaded, out)
        return
    job.check(loaded, out, nproc)
    if nproc == 1:
        job.pretrain(loaded, out)
        return
    # Here, once and with a progress bar; the ranks then find the index fresh.
    job.prepare(loaded, out)
    code = launch_local_ranks(nproc, ["pretrain", recipe, *overrides, "--out", str(out)])
    if code:
        raise typer.Exit(code)


@app.command()
def doctor(
    build: Annotated[bool, typer.Option("--build", help="Build DeepSpeed's helpers now, once.")] = False,
) -> None:
    """Show what is installed, which devices there are and what will be used.

    Example: `mae-scale doctor`
    """
    from mae_scale import doctor as checks

    if build:
        checks.build()
    else:
        checks.report()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """The whole story on a laptop: data, pre-training with two ranks, probe, pictures, MLflow.

    Example: `mae-scale demo --out demo`
    """
    from mae_scale.demo import run_demo

    run_demo(out, seed)


@data_app.command("index")
def data_index(
    root: Annotated[Path, typer.Argument(help="A folder of images, or of tar shards.")],
    index: Annotated[Optional[Path], typer.Option(help="Index file; by default beside the data.")] = None,  # noqa: UP045
    workers: Annotated[Optional[int], typer.Option(min=1, help="Processes; by default one a core.")] = None,  # noqa: UP045
) -> None:
    """Build or refresh the index of a data folder, and list what cannot be read.

    Example: `mae-scale data index /data/imagenet/train`
    """
    from data_pipeline.index import open_index

    found = open_index(root, index, workers=workers)
    typer.echo(found.summary())


@data_app.command("verify")
def data_verify(
    root: Annotated[Path, typer.Argument(help="A folder of images, or of tar shards.")],
    index: Annotated[Optional[Path], typer.Option(help="Index file; by default beside the data.")] = None,  # noqa: UP045
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image.")] = False,
) -> None:
    """Check every image; exit code 1 when some cannot be read.

    Example: `mae-scale data verify --deep /data/imagenet/train`
    """
    from data_pipeline.index import open_index, verify

    found = open_index(root, index)
    bad = [*found.unreadable, *verify(found, deep=deep)]
    for name, reason in bad:
        typer.echo(f"{name}: {reason}")
    typer.echo(
        f"{len(found) + len(found.bad)} images, {len(bad)} bad"
        + ("" if deep else " (headers and ends only; --deep decodes)")
    )
    if bad:
        raise typer.Exit(EXIT_FAILED)


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


def main() -> None:
    """Entry point: errors that are explained become one line and an exit code, without a traceback."""
    rank = os.environ.get("RANK")
    try:
        app()
    except (UsageError, RunError) as error:
        who = f"rank {rank}: " if rank not in (None, "0") else ""
        print(f"error: {who}{error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
