"""The commands on checkpoints: `mae-scale checkpoints ...` and `mae-scale export`."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import EXIT_FAILED, UsageError

checkpoints_app = typer.Typer(help="List, verify and remove the checkpoints of a run.")
export_app = typer.Typer()
Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run's output folder, or its folder checkpoints.")]


@checkpoints_app.command("list")
def checkpoints_list(run: Run) -> None:
    """List the checkpoints: step, age, size, and whether they are whole (by the files' sizes).

    Example: `mae-scale checkpoints list runs/vit_huge`
    """
    from mae_scale.checkpoints.maintenance import checkpoints_of, print_table, verify_sizes

    print_table(checkpoints_of(run), verify_sizes)


@checkpoints_app.command("verify")
def checkpoints_verify(run: Run) -> None:
    """Read every byte and compare it with its digest; exit code 1 when a checkpoint is not whole.

    Example: `mae-scale checkpoints verify runs/vit_huge`
    """
    from mae_scale.checkpoints.maintenance import checkpoints_of, print_table
    from mae_scale.checkpoints.store import verify

    if not print_table(checkpoints_of(run), verify):
        raise typer.Exit(EXIT_FAILED)


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: Run,
    keep: Annotated[int, typer.Option(metavar="N", min=1, help="Number of newest checkpoints to keep.")] = 1,
    keep_every_epochs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Also keep those of every n-th epoch.", show_default=False),
    ] = None,
    keep_best: Annotated[
        bool,
        typer.Option("--keep-best", help="Also keep the best one, by the run's checkpoint.keep_best, else train/loss."),
    ] = False,
) -> None:
    """Remove old checkpoints and the remains of interrupted saves; refused while the run trains.

    Example: `mae-scale checkpoints prune runs/vit_huge --keep 1 --keep-every-epochs 100`
    """
    from mae_scale.checkpoints.maintenance import best_by, checkpoints_of, prune
    from mae_scale.checkpoints.store import Retention
    from mae_scale.training.run_lock import refuse_held

    checkpoints = checkpoints_of(run)
    refuse_held(checkpoints.parent)
    gone = prune(checkpoints, Retention(keep, keep_every_epochs, best_by(checkpoints) if keep_best else None))
    for folder in gone:
        typer.echo(f"removed {folder.name}")
    typer.echo(f"{len(gone)} removed")


@export_app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder (its newest whole checkpoint).")],
    out: Annotated[
        Path, typer.Argument(help="File to write, .safetensors or .pth; for timm and hf any other name is a folder.")
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="LAYOUT",
            help="official (the authors' release), timm, hf, vitdet (a detector), or safetensors (our names).",
        ),
    ] = "official",
) -> None:
    """Export the weights of a checkpoint, on any machine, whatever ranks and engine wrote it.

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
