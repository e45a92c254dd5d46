"""The plan of a job that is to be sent: what it takes, and the refusal of what cannot fit."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.planning.hardware import DEFAULT_LINK, gpu_in, gpu_named, link_named
from mae_scale.tasks.plan import Plan, asked_of, make_plan
from mae_scale.tasks.plan_text import fit_of, overrides_of, plan_summary


@dataclass(frozen=True)
class Nodes:
    """The nodes that a job asks for."""

    count: int
    gpus_per_node: int
    ranks_per_node: int
    gpu: str | None
    """As `mae-scale plan` or Slurm names it; None: not known."""
    link: str | None
    """Between nodes; None: that which `mae-scale plan` assumes."""


def check_hardware(gpu: str | None, link: str | None) -> None:
    """Raise UsageError for a GPU or a link, of an option or the site, that is not known."""
    if gpu is not None:
        gpu_named(gpu)
    if link is not None:
        link_named(link)


def job_plan(name: str, recipe: Recipe, nodes: Nodes, *, force: bool) -> list[str]:
    """Return lines on what a job takes; none for nodes without GPUs, one where it cannot be planned.

    Raises UsageError for what does not fit, unless `force`.
    """
    if not nodes.gpus_per_node:
        return []
    gpu = gpu_in(nodes.gpu or "")
    if gpu is None:
        kind = f"GPU {nodes.gpu} of the template" if nodes.gpu else "the kind of GPU"
        return [f"no plan: {kind} is not known; add --gpu h100, or set MAE_SCALE_GPU in slurm/environment.sh"]
    if nodes.ranks_per_node > nodes.gpus_per_node:
        return [f"no plan for {name}: {nodes.ranks_per_node} ranks share {nodes.gpus_per_node} GPUs"]
    try:
        shape = {"nodes": nodes.count, "gpus_per_node": nodes.ranks_per_node}
        plan = make_plan(asked_of(name, recipe, **shape, gpu=gpu.name, link=nodes.link or DEFAULT_LINK))
    except UsageError as error:
        return [f"no plan for {name}: {error}"]
    where = f"{nodes.count} x {nodes.ranks_per_node} {gpu.name}"
    lines = [f"plan for {name} on {where}", *(f"  {line}" for line in plan_summary(plan))]
    if not plan.as_is.fits:
        if not force:
            raise UsageError(f"{name} on {where} {fit_of(plan)}; {_what_to_do(plan)}")
        lines.append("  it is sent all the same (--force)")
    return lines


def _what_to_do(plan: Plan) -> str:
    fitting = f"use {overrides_of(plan, plan.best)}" if plan.best else f"nothing does: try {plan.larger[0]}"
    return f"{fitting}; --force sends it all the same"
