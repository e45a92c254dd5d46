"""The commands for a Slurm cluster: `mae-scale submit` and `mae-scale slurm`."""

from pathlib import Path
from typing import Annotated

import typer

from mae_scale.cli.completion import complete_chain

slurm_app = typer.Typer()


Chain = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE|section.key=value",
        autocompletion=complete_chain,
        help="The chain's recipes; overrides apply to all of them, classifier.*, detection.*, ... to their task only.",
    ),
]
Nodes = Annotated[int, typer.Option(metavar="N", min=1, help="Number of nodes per job.")]
ChainOut = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Parent folder: DIR/slurm, and a folder for each recipe.")
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="GPUs per node; default: the template's; 0: nodes without GPUs."),
]
NtasksPerNode = Annotated[int | None, typer.Option(metavar="N", min=1, help="Ranks per node; default: one per GPU.")]
CpusPerTask = Annotated[int | None, typer.Option(metavar="N", min=1, help="Cores per rank; default: the template's.")]
Partition = Annotated[str | None, typer.Option(metavar="NAME", help="Partition; default: the site's.")]
Account = Annotated[str | None, typer.Option(metavar="NAME", help="Account; default: the site's.")]
Time = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Time limit of one start, such as 24:00:00; the job is requeued after it."),
]


@slurm_app.command()
def submit(
    recipes: Chain,
    nodes: Nodes,
    out: ChainOut,
    gpus_per_node: GpusPerNode = None,
    ntasks_per_node: NtasksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    partition: Partition = None,
    account: Account = None,
    time: Time = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GPU to plan for: h100, ...; default: the template's, the site's."),
    ] = None,
    link: Annotated[
        str | None, typer.Option(metavar="NAME", help="Link between nodes to plan for; default: the site's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Send what the plan says does not fit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the scripts; write nothing and send nothing.")
    ] = False,
) -> None:
    """Send a chain of Slurm jobs, one per recipe, each to start when the one before has succeeded.

    A classifier, detector or segmenter without weights starts from the weights of the job before it. What cannot fit on
    the GPUs is refused.

    Example: `mae-scale submit pretrain/vit_huge_1600ep finetune/vit_huge_224 finetune/vit_huge_448 --nodes 16
    --out runs data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    from mae_scale.launch import slurm as jobs

    shape = jobs.Shape(
        nodes,
        gpus_per_node,
        ntasks_per_node,
        cpus_per_task,
        partition=partition,
        account=account,
        time=time,
        gpu=gpu,
        link=link,
    )
    jobs.submit(recipes, shape, out, dry_run=dry_run, force=force)


@slurm_app.command("slurm")
def slurm_templates(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write them into.")]) -> None:
    """Write the Slurm templates into a folder, to be adapted to the site and sent with sbatch.

    `mae-scale submit` uses the templates in ./slurm where that folder exists.

    Example: `mae-scale slurm slurm`, then `sbatch --nodes=16 slurm/pretrain.sbatch pretrain/vit_huge_1600ep
    --out runs/vit_huge data.root=/data/imagenet/train`
    """
    from mae_scale.launch.slurm_templates import copy_templates

    copy_templates(folder)
