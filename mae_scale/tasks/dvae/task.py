"""The discrete VAE as a task: train the tokeniser whose words BEiT predicts, measure its words, export its encoder."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.checkpoints.tokeniser import export_tokeniser, trained_tokeniser
from mae_scale.engines.base import Engine
from mae_scale.models.dvae import DiscreteVae, log_likelihood
from mae_scale.models.tokeniser import STRIDE, TokeniserSize, from_normalised, into_open_interval
from mae_scale.planning.flops import training_flops
from mae_scale.planning.workload import Workload
from mae_scale.tasks.dvae.objective import Annealing, ReconstructThroughWords
from mae_scale.tasks.dvae.reconstructions import WordReconstructions
from mae_scale.tasks.dvae.validation import WordValidation
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.preflight import training_augmentation
from mae_scale.training.schedule import steps_of
from mae_scale.training.self_check import Untrained
from mae_scale.training.shown_images import some_images
from mae_scale.training.task import Evaluator, Task
from mae_scale.training.workload import workload_of

UNTRAINED_IMAGES = 64
NATS = 0.02
"""A loss so near to that of a model that sees nothing, in nats per pixel value, is one that has learnt nothing."""


class DiscreteVaeTraining(Task[ReconstructThroughWords]):
    """Train a discrete variational autoencoder of images (Ramesh et al., section 2.1)."""

    command: ClassVar[str] = "pretrain"

    @property
    def kind(self) -> str:
        return "dvae"

    def check(self, layout: BatchLayout) -> None:
        """Refuse sizes that no tokeniser has, and what a recipe says in vain."""
        recipe, section = self.recipe, self.recipe.tokenisation
        if recipe.model.square_side % STRIDE:
            raise UsageError(
                f"model.image_size={recipe.model.square_side}: a word stands for {STRIDE} x {STRIDE} pixels; give a "
                f"multiple of {STRIDE}"
            )
        for key in ("weights", "tokens"):
            if getattr(section, key) is not None:
                raise UsageError(f"tokeniser.{key}: task dvae trains a tokeniser and reads no words; drop it")
        if recipe.model.drop_path:
            raise UsageError(f"model.drop_path={recipe.model.drop_path:g}: task dvae does not drop paths; leave it 0")
        if recipe.tracking.knn_images is not None:
            raise UsageError("tracking.knn_images: task dvae has no features to compare; drop it")

    def build(self, index: Index) -> ReconstructThroughWords:
        return self._objective(steps_of(self.recipe, len(index)).total)

    def training_flops(self) -> int:
        return training_flops(sum(2 * rows * inner * outer for rows, inner, outer in self._arithmetic()[0]))

    def workload(self, classes: int) -> Workload:
        products, values, other_bytes = self._arithmetic()
        with torch.device("meta"):
            objective = self._objective(1)
        return workload_of(
            objective,
            self.recipe,
            stacks=(),
            products=tuple((rows, inner, outer, True) for rows, inner, outer in products),
            predicted=objective.model.encoder.size.words * objective.grid**2,
            kept_values=values,
            kept_bytes=other_bytes,
        )

    def model_in_words(self) -> tuple[str, str]:
        section = self.recipe.tokenisation
        sizes = f"width {section.width}, {section.blocks_per_group} blocks in each of 4 groups"
        return f"tokeniser of {section.words} words", sizes

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        found: list[Evaluator] = [WordReconstructions(context, engine, tracker)]
        if self.recipe.data.val_root is not None:
            found.append(WordValidation(context, engine, words=self.recipe.tokenisation.words))
        return found

    def untrained_loss(self, context: RunContext, objective: ReconstructThroughWords) -> Untrained | None:
        """Return the loss of the logit-Laplace distribution, one per channel, that fits all pixels of some images best.

        Its location is their median, its scale the mean distance from it; the words then say nothing, and cost nothing.
        """
        images = some_images(context.index, UNTRAINED_IMAGES, self.recipe, training_augmentation(self.recipe))
        pixels = from_normalised(images)
        logits = torch.logit(into_open_interval(pixels)).transpose(0, 1).flatten(1)  # [3, N S^2]
        location = logits.median(dim=1, keepdim=True).values
        scale = (logits - location).abs().mean(dim=1, keepdim=True)
        statistics = torch.cat([location, scale.log()])[None, :, :, None]  # [1, 6, 1, 1]
        loss = -float(log_likelihood(statistics, pixels).mean())
        return Untrained(loss, "that of one distribution for all pixels", tolerance=NATS / max(abs(loss), 1e-9))

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        weights = context.out / "export" / "model.safetensors"
        if not weights.exists():
            export_tokeniser(trained_tokeniser(list_checkpoints(context.checkpoints)[-1][1]), weights)
        return f"tokeniser in {weights}"

    def _objective(self, steps: int) -> ReconstructThroughWords:
        section, image_size = self.recipe.tokenisation, self.recipe.model.square_side
        model = DiscreteVae(TokeniserSize(section.width, section.words, section.blocks_per_group))
        return ReconstructThroughWords(
            model, Annealing.of(section, steps), image_size=image_size, seed=self.recipe.seed
        )

    def _arithmetic(self) -> tuple[list[tuple[int, int, int]], int, int]:
        """Return the convolutions as matrix products, and what autograd keeps of one image beside the weights.

        (rows per image, inner, outer) of each: output pixels, input channels x kernel area, output channels. Kept:
        values in the weights' precision, and bytes of the rest. Found by running one image of no content.
        """
        side = self.recipe.model.square_side
        products: list[tuple[int, int, int]] = []
        values: dict[int, int] = {}
        other_bytes: dict[int, int] = {}
        with torch.device("meta"):
            objective = self._objective(1).to(torch.bfloat16)
            image = torch.zeros(1, 3, side, side)
            noise = torch.zeros(1, objective.model.encoder.size.words, objective.grid, objective.grid)
            ones = torch.ones(1)
        weights = {id(parameter) for parameter in objective.parameters()}

        def product(layer: nn.Module, _: object, output: torch.Tensor) -> None:
            assert isinstance(layer, nn.Conv2d)
            products.append((math.prod(output.shape[2:]), layer.weight[0].numel(), layer.out_channels))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in weights:
                storage = id(tensor.untyped_storage())
                if tensor.dtype == torch.bfloat16:
                    values[storage] = tensor.numel()
                else:
                    other_bytes[storage] = tensor.numel() * tensor.element_size()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        for module in objective.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(product)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective(image, noise, ones, ones)
        return products, sum(values.values()), sum(other_bytes.values())
