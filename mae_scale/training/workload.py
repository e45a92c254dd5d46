"""From an objective to the numbers that memory and time are planned from."""

from mae_scale.config.schema import Recipe
from mae_scale.engines.base import Objective
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.planning.workload import Stack, Workload


def workload_of(
    objective: Objective,
    recipe: Recipe,
    *,
    stacks: tuple[Stack, ...],
    products: tuple[tuple[int, int, int, bool], ...],
    predicted: int,
    kept_values: int = 0,
    kept_bytes: int = 0,
) -> Workload:
    """Return the workload of an objective, which may lie on the device "meta"."""
    groups = parameter_groups(objective, recipe.optim)
    followers = tuple(parameter.numel() for parameter in objective.followers.values())
    return Workload(
        image_size=recipe.model.image_size,
        stacks=stacks,
        other_products=products,
        predicted=predicted,
        kept_values=kept_values,
        kept_bytes=kept_bytes,
        groups=tuple(sum(p.numel() for p in group["params"]) for group in groups),
        frozen=sum(p.numel() for p in objective.parameters() if not p.requires_grad) + sum(followers),
        parameters=tuple(p.numel() for p in objective.parameters() if p.requires_grad),
        buffer_bytes=sum(b.numel() * b.element_size() for b in objective.buffers()),
        ema=bool(recipe.classifier and recipe.classifier.ema) or bool(followers),
        followers=followers,
    )
