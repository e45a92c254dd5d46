"""The three loops that bench/engine.py times: the product's engine, a plain one of our model, Hugging Face's model."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peer import layers_of, make_peer
from sizes import SIZES, recipe_of
from torch import nn

from mae_scale.config.schema import Recipe
from mae_scale.engines.activation_checkpointing import checkpoint_activations
from mae_scale.engines.compilation import compile_blocks
from mae_scale.engines.optimizers import optimizer_class, optimizer_options, parameter_groups
from mae_scale.engines.policy import compiles, layout_of, refuse_wrong_combinations
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_model
from mae_scale.packaged import packaged
from mae_scale.tasks.mae.objective import Reconstruct

LR = 1e-4


@dataclass
class Loop:
    """A model in training on one fixed global batch."""

    step: Callable[[], torch.Tensor]
    """Do one update; the loss, [] on the device, the mean over the micro-batches."""
    close: Callable[[], None] = lambda: None
    refuses_compilation: bool = False


def engine_loop(setting, device: torch.device, stage: int, timer: bool | None = None, *more: str) -> Loop:
    """Return the product's own step; timer switches DeepSpeed's throughput timer, None leaves what is packaged."""
    overrides = [f"engine.zero_stage={stage}", *more]
    with tempfile.TemporaryDirectory() as folder:
        if timer is not None:
            config = json.loads((packaged("ds_configs") / f"zero{stage}.json").read_text())
            config["timers"] = {"throughput": {"enabled": timer}}
            path = Path(folder) / f"zero{stage}.json"
            path.write_text(json.dumps(config))
            overrides.append(f"engine.config={path}")
        recipe = _recipe(setting, *overrides)
        gpu = device.type == "cuda"
        # Blocks are compiled wherever that is known to be right: not under ZeRO 3.
        wanted = setting.compiled and compiles(recipe, stage, True)
        recipe = _recipe(setting, *overrides, f"engine.compile={str(wanted).lower()}")
        refuse_wrong_combinations(recipe, gpu=gpu)
        objective, batch = _objective(recipe, device)
        linear = nn.functional.linear
        engine = scale_out(objective, recipe, layout_of(recipe, 1), device)

    def close() -> None:
        engine.close()
        nn.functional.linear = linear  # ZeRO 3 puts its own there, for good; compiled, it loses gradients

    return Loop(lambda: engine.train_step(batch, LR).loss, close, refuses_compilation=not wanted)


def plain_loop(setting, device: torch.device, *more: str) -> Loop:
    """Return a plain loop of our model: fp32, or bf16 with fp32 master weights and gradients."""
    recipe = _recipe(setting, *more)
    objective, batch = _objective(recipe, device)
    _apply(setting, objective.blocks)
    groups = parameter_groups(objective, recipe.optim)
    if setting.precision == "fp32":
        optimizer = optimizer_class(recipe.optim)(groups, **optimizer_options(recipe.optim) | {"lr": LR})
        return Loop(lambda: _update(objective, batch, optimizer))
    weights = [p for group in groups for p in group["params"]]
    objective.to(torch.bfloat16)  # in place: the groups' parameters are still the model's
    masters = [p.detach().float() for p in weights]  # of the rounded weights, as DeepSpeed's
    of_weight = dict(zip(weights, masters, strict=True))
    for group in groups:
        group["params"] = [of_weight[p] for p in group["params"]]
    optimizer = optimizer_class(recipe.optim)(groups, **optimizer_options(recipe.optim) | {"lr": LR})

    def step() -> torch.Tensor:
        losses = []
        for number, tensors in enumerate(batch):
            loss = objective(*tensors)
            (loss / len(batch)).backward()
            gradients = [p.grad for p in weights]
            if number:
                torch._foreach_add_([m.grad for m in masters], gradients)
            else:
                for master, gradient in zip(masters, gradients, strict=True):
                    master.grad = gradient.float()
            objective.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return torch.stack(losses).mean()

    return Loop(step)


def peer_loop(setting, device: torch.device) -> Loop:
    """Return a plain loop of Hugging Face's model with our weights; bf16 is autocast over fp32 weights."""
    recipe = _recipe(setting)
    objective, batch = _objective(recipe, device)
    peer = make_peer(objective.model).train()
    del objective
    _apply(setting, layers_of(peer))
    trained = [(name, p) for name, p in peer.named_parameters() if p.requires_grad]
    exempt = [p.ndim <= 1 or name.endswith(("cls_token", "mask_token")) for name, p in trained]
    groups = [
        {"params": [p for (_, p), e in zip(trained, exempt, strict=True) if not e], "weight_decay": 0.05},
        {"params": [p for (_, p), e in zip(trained, exempt, strict=True) if e], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **optimizer_options(recipe.optim) | {"lr": LR})
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16")

    def loss_of(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast:
            return peer(pixel_values=images, noise=noise).loss

    return Loop(lambda: _update(loss_of, batch, optimizer))


def _update(loss_of: Callable, batch: list[tuple[torch.Tensor, ...]], optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for tensors in batch:
        loss = loss_of(*tensors)
        (loss / len(batch)).backward()
        losses.append(loss.detach().float())
    optimizer.step()
    return torch.stack(losses).mean()


def _recipe(setting, *overrides: str) -> Recipe:
    return recipe_of(
        SIZES[setting.size],
        f"data.global_batch={setting.micro_batch * setting.accumulation}",
        f"engine.micro_batch={setting.micro_batch}",
        f"engine.precision={setting.precision}",
        f"engine.activation_checkpointing={setting.checkpointing}",
        *overrides,
    )


def _objective(recipe: Recipe, device: torch.device) -> tuple[Reconstruct, list[tuple[torch.Tensor, ...]]]:
    """The objective with fresh weights, and its micro-batches, on the device; the same for all loops of a recipe."""
    with device:
        objective = Reconstruct(build_model(recipe), seed=0)
    model, micro_batch = objective.model, recipe.engine.micro_batch
    random = torch.Generator().manual_seed(1)
    images = torch.randn(recipe.data.global_batch, 3, model.image_size, model.image_size, generator=random).to(device)
    noise = torch.rand(recipe.data.global_batch, model.patches, generator=random).to(device)
    return objective, list(zip(images.split(micro_batch), noise.split(micro_batch), strict=True))


def _apply(setting, blocks: list[nn.Module]) -> None:
    if setting.compiled:
        compile_blocks(blocks)
    policy = setting.checkpointing
    checkpoint_activations(blocks, int(policy) if policy.isdigit() else policy)
