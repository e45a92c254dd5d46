"""The commands: parse, call, print. Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 75 stopped on request,
130 ended by Ctrl-C."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer

from data_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RunError, UsageError
from mae_scale.cli.checkpoints import checkpoints_app
from mae_scale.cli.completion import complete_chain
from mae_scale.cli.data import data_app
from mae_scale.cli.help import common, run
from mae_scale.cli.measure import measure_app
from mae_scale.cli.options import (
    Json,
    can_be_stopped,
)
from mae_scale.cli.recipes import recipes_app
from mae_scale.cli.train import train_app
from mae_scale.distributed.ranks import leave, say_error, this_rank
from mae_scale.distributed.stop_requests import INTERRUPTED

WRONG_ARGUMENTS = typer.BadParameter.__base__  # click's UsageError, wherever this typer has it from

app = typer.Typer(
    name="mae-scale",
    callback=common,
    help="Masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(train_app)
app.add_typer(measure_app)
app.add_typer(data_app, name="data", no_args_is_help=True)
app.add_typer(checkpoints_app, name="checkpoints", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", no_args_is_help=True)


@app.command()
def doctor() -> None:
    """Show what is installed, which devices there are and what will be used.

    Example: `mae-scale doctor`
    """
    from mae_scale.cli import doctor as checks

    checks.report()


@app.command()
@can_be_stopped
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data, run and pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the run.")] = 0,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="The paper's comparison in small: every way of transfer, three seeds.")
    ] = False,
    json: Json = None,
) -> None:
    """The whole story on a laptop: data, pre-training with two ranks, probe, pictures, MLflow.

    Example: `mae-scale demo --out demo`, then `mae-scale demo --out demo --transfer --json transfer.json`
    """
    if transfer:
        if seed:
            raise UsageError("--seed is for the plain demo; --transfer runs the seeds 0, 1 and 2")
        from mae_scale.reproduce.digits_transfer import run_transfer

        run_transfer(out, json)
        return
    if json is not None:
        raise UsageError("--json is for `demo --transfer`; the plain demo prints its two figures")
    from mae_scale.reproduce.digits import run_demo

    run_demo(out, seed)


@app.command()
def submit(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|section.key=value",
            autocompletion=complete_chain,
            help="A chain; overrides are for every recipe, those of the section classifier for classifiers.",
        ),
    ],
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes of each job.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Parent folder: DIR/slurm, and a folder for each recipe.")],
    gpus_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=0, help="By default the template's; 0: nodes without GPUs.", show_default=False),
    ] = None,
    ntasks_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Ranks a node; by default one a GPU.", show_default=False),
    ] = None,
    cpus_per_task: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Cores a rank; by default the template's.", show_default=False),
    ] = None,
    partition: Annotated[Optional[str], typer.Option(metavar="NAME", help="By default the site's.")] = None,  # noqa: UP045
    account: Annotated[Optional[str], typer.Option(metavar="NAME", help="By default the site's.")] = None,  # noqa: UP045
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TIME", help="Limit of one start, such as 24:00:00; a job goes on after it.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the scripts; write and send nothing.")] = False,
) -> None:
    """Send a chain of Slurm jobs, a recipe each, each after the one before has succeeded.

    A classifier without weights starts from the link before it.

    Example: `mae-scale submit pretrain/vit_huge_1600ep finetune/vit_huge_224 finetune/vit_huge_448 --nodes 16
    --out runs data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    from mae_scale.launch import slurm as jobs

    shape = jobs.Shape(
        nodes, gpus_per_node, ntasks_per_node, cpus_per_task, partition=partition, account=account, time=time
    )
    jobs.submit(recipes, shape, out, dry_run=dry_run)


@app.command("slurm")
def slurm_templates(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write them into.")]) -> None:
    """Write the Slurm templates into a folder, to be fitted to the site there and sent with sbatch.

    In the folder where it is called, `mae-scale submit` takes those of ./slurm.

    Example: `mae-scale slurm slurm`, then `sbatch --nodes=16 slurm/pretrain.sbatch pretrain/vit_huge_1600ep
    --out runs/vit_huge data.root=/data/imagenet/train`
    """
    from mae_scale.launch.slurm_templates import copy_templates

    copy_templates(folder)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder: its newest whole one.")],
    out: Annotated[
        Path, typer.Argument(help="File to write, .safetensors or .pth; for timm and hf any other name is a folder.")
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--format", metavar="LAYOUT", help="official (the authors' release), timm, hf, or safetensors (our names)."
        ),
    ] = "official",
) -> None:
    """Write the weights of a checkpoint; on any machine, whatever ranks and engine wrote it.

    As one file, or for timm and hf as a folder that `timm.create_model("local-dir:OUT", pretrained=True)` or
    transformers' `from_pretrained("OUT")` opens: weights, architecture, class names, preparation of images.

    Example: `mae-scale export runs/vit_huge vit_huge.pth`, or `mae-scale export runs/vit_huge vit_huge_hf --format hf`
    """
    from mae_scale.checkpoints.export import FORMATS, SUFFIXES, checkpoint_model, export_weights, find_checkpoint
    from mae_scale.checkpoints.model_folder import export_folder
    from mae_scale.checkpoints.store import read_manifest

    if layout not in FORMATS:
        raise UsageError(f"--format {layout} is not known; expected {', '.join(FORMATS)}")
    folder = find_checkpoint(checkpoint)
    model, _ = checkpoint_model(folder)
    what = f"{layout} layout"
    if layout in ("timm", "hf") and out.suffix not in SUFFIXES:
        what = export_folder(model, read_manifest(folder).get("classes"), out, layout)
    else:
        export_weights(model, out, layout)
    typer.echo(f"{out}: {what}, from {folder}")


def main() -> None:
    """Entry point: errors that are explained become one line a job and an exit code, without a traceback."""
    # Gloo, of a peer that is lost, would print a C++ stack trace before our line that names it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = EXIT_DONE
    try:
        code = run(app, speaks=this_rank().is_first)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except WRONG_ARGUMENTS as error:  # the first rank's has been said by typer
        code = error.exit_code
    except (UsageError, RunError) as error:
        code = error.exit_code
        say_error(error)
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    if code == EXIT_INTERRUPTED:  # typer has taken the KeyboardInterrupt
        print(INTERRUPTED, file=sys.stderr)
    if "RANK" in os.environ:
        leave(code or EXIT_DONE)
    sys.exit(code)


if __name__ == "__main__":
    main()
