"""`mae-scale plan`: what fits, how long it takes and how it scales, for a recipe on given GPUs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from data_pipeline.json_object import read_object
from mae_scale.config.schema import Recipe
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.planning.collectives import Cluster
from mae_scale.planning.failures import SAVE_S, STORAGE_BYTES_PER_S, Failures, failures_of
from mae_scale.planning.hardware import Gpu, Link, gpu_named, gpus, link_named
from mae_scale.planning.memory import Setting, states_of
from mae_scale.planning.rates import Rates, calibrated, rates_of
from mae_scale.planning.search import (
    Candidate,
    Choices,
    Scale,
    all_candidates,
    candidate,
    largest_that_fit,
    recommended,
    scaling,
)
from mae_scale.planning.workload import Workload
from mae_scale.reports.plan import plan_figure
from mae_scale.tasks.registry import task_of
from mae_scale.training.planned import setting_of

GIB = 2**30
IMAGE_BYTES = 110_000
"""Mean size of a JPEG of ImageNet-1K."""
MOST_GPUS = 4096
SAVED_BYTES = 12
"""Per trained parameter in a checkpoint: weight and two moments in float32."""
AVERAGE_BYTES = 4
"""The same of an average of the weights, where one is kept."""


@dataclass(frozen=True)
class Asked:
    """What is planned: a recipe on a cluster."""

    name: str
    recipe: Recipe
    cluster: Cluster
    gpu: Gpu
    link: Link
    images: int | None = None
    """Training images; None: of the data set that the task is planned for."""
    calibration: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's plan: as it stands, and what is recommended."""

    asked: Asked
    work: Workload
    rates: Rates
    as_is: Candidate
    best: Candidate | None
    choices: list[Candidate]
    """With each ZeRO stage, offload and policy the largest micro-batch that fits."""
    strong: list[Scale]
    weak: list[Scale]
    larger: list[str]
    """Where nothing fits: what would have to change, in order of cost."""

    @property
    def images(self) -> int:
        """Training images that the recipe takes of the data set's."""
        data, task = self.asked.recipe.data, task_of(self.asked.recipe, Path())
        images = self.asked.images or task.planned_images
        if data.labels_per_class is not None:
            return min(images, data.labels_per_class * task.planned_classes)
        return int(images * (data.fraction or 1))

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""
        recipe = self.asked.recipe
        return max(1, self.images // recipe.data.global_batch) * recipe.schedule.epochs

    def hours(self, one: Candidate) -> float:
        """Return the hours of the whole schedule."""
        return self.steps * one.time.total / 3600

    def gpu_hours(self, one: Candidate) -> float:
        """Return the hours of the whole schedule, times the number of GPUs."""
        return self.hours(one) * self.asked.cluster.ranks

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of a checkpoint."""
        return (SAVED_BYTES + AVERAGE_BYTES * self.work.ema) * self.work.trained

    @property
    def failures(self) -> Failures:
        """Return how often the run fails and how often to save: copied to the host's memory, then written beside."""
        shown, cluster = self.best or self.as_is, self.asked.cluster
        size = self.saved_bytes
        return failures_of(
            cluster.ranks,
            SAVE_S + size / cluster.ranks / self.rates.host_bytes_per_s,
            shortest_s=size / STORAGE_BYTES_PER_S,
            longest_s=self.steps * shown.time.total,
        )

    def draw(self, path: Path) -> None:
        """Write a PNG of weak and strong scaling."""
        asked = self.asked
        plan_figure(
            self.weak,
            self.strong,
            path,
            title=f"{asked.name}, nodes of {asked.cluster.gpus_per_node} {asked.gpu.name}, {asked.link.name}",
            global_batch=asked.recipe.data.global_batch,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the plan as numbers; the keys at the top are those of the recipe as it stands."""
        asked, data = self.asked, self.asked.recipe.data
        return {
            "recipe": asked.name,
            "nodes": asked.cluster.nodes,
            "gpus_per_node": asked.cluster.gpus_per_node,
            "gpu": asked.gpu.name,
            "link": asked.link.name,
            **self._numbers(self.as_is),
            "recommended": None if self.best is None else self._numbers(self.best),
            "choices": [self._numbers(one) for one in self.choices],
            "strong_scaling": [asdict(scale) for scale in self.strong],
            "weak_scaling": [asdict(scale) for scale in self.weak],
            "checkpoint_gib": self.saved_bytes / GIB,
            "data_mb_per_s": self.as_is.images_per_second * IMAGE_BYTES / 1e6,
            "failures": asdict(self.failures),
            "steps": self.steps,
            "global_batch": data.global_batch,
            "measured": sorted(self.rates.measured),
            "what_would_have_to_change": self.larger,
        }

    def _numbers(self, one: Candidate) -> dict[str, Any]:
        setting = one.setting
        return {
            "zero_stage": setting.zero_stage,
            "offload": setting.offload,
            "activation_checkpointing": setting.checkpointing,
            "micro_batch": setting.micro_batch,
            "accumulation": setting.accumulation,
            "precision": setting.precision,
            "fits": one.fits,
            "memory_gib": one.memory.total / GIB,
            "memory_parts_gib": {name: size / GIB for name, size in asdict(one.memory).items()},
            "states_gib": states_of(self.work, setting) / GIB,
            "step_time_s": one.time.total,
            "step_parts_s": asdict(one.time),
            "images_per_second": one.images_per_second,
            "hours": self.hours(one),
            "gpu_hours": self.gpu_hours(one),
            "kwh": self.gpu_hours(one) * self.rates.power_w / 1000,
        }


def make_plan(asked: Asked) -> Plan:
    """Return the plan. Raises UsageError for what cannot be planned."""
    recipe, cluster = asked.recipe, asked.cluster
    if recipe.engine.backend != "deepspeed":
        raise UsageError(
            f"engine.backend={recipe.engine.backend} cannot be planned; plan with engine.backend=deepspeed"
        )
    refuse_wrong_combinations(recipe, gpu=True)
    layout = layout_of(recipe, cluster.ranks)
    setting = setting_of(recipe, layout, gpu=True, decodes=recipe.data.device != "cpu")
    rates = rates_of(asked.gpu, asked.link, link_named(asked.gpu.link), setting.precision)
    if asked.calibration is not None:
        source = f"--calibrate {asked.calibration}"
        rates = calibrated(rates, read_object(asked.calibration, source), source)
    task = task_of(recipe, Path())
    work = task.workload(task.planned_classes)
    capacity = 1e9 * asked.gpu.memory_gb
    found = all_candidates(work, setting, cluster, rates, capacity, _choices(recipe, setting))
    best = recommended(found)
    scaled = best or min(found, key=lambda one: one.memory.total)
    scales = partial(
        scaling,
        work,
        scaled.setting,
        rates,
        capacity,
        gpus_per_node=cluster.gpus_per_node,
        up_to=MOST_GPUS,
        whole_share=_takes_whole_share(recipe),
    )
    return Plan(
        asked=asked,
        work=work,
        rates=rates,
        as_is=candidate(work, setting, cluster, rates, capacity),
        best=best,
        choices=largest_that_fit(found),
        strong=scales(global_batch=recipe.data.global_batch),
        weak=scales(global_batch=None),
        larger=[] if best else _larger(work, found, asked, rates),
    )


def asked_of(name: str, recipe: Recipe, *, nodes: int, gpus_per_node: int, gpu: str, link: str, **more: Any) -> Asked:
    """Return what is to be planned. Raises UsageError for an unknown GPU or link."""
    return Asked(name, recipe, Cluster(nodes, gpus_per_node), gpu_named(gpu), link_named(link), **more)


def _choices(recipe: Recipe, setting: Setting) -> Choices:
    """Return what may be chosen: the stage of a file of the user's own (engine.config), else none that is wrong for the
    optimiser, or sums gradients in less than float32; micro-batches that the task can train with.
    """
    share, section = setting.micro_batch * setting.accumulation, recipe.classifier
    micro_batches = [n for n in range(1, share + 1) if share % n == 0]
    if _takes_whole_share(recipe):
        micro_batches = [share]
    elif section is not None and (section.mixup or section.cutmix):  # they mix neighbours
        micro_batches = [n for n in micro_batches if n % 2 == 0]
    stages = [(stage, False) for stage in (0, 1, 2, 3)] + [(3, True)]
    if recipe.engine.config is not None:
        stages = [(setting.zero_stage, setting.offload)]
    elif recipe.optim.name == "lars":
        stages = stages[:1]
    elif setting.precision != "fp32":
        stages = stages[1:]
    return Choices(stages, micro_batches, compiled=recipe.engine.compile is not False)


def _takes_whole_share(recipe: Recipe) -> bool:
    """Return whether a rank's share must be one micro-batch: negatives or statistics are of the whole global batch."""
    return recipe.moco is not None or (recipe.classifier is not None and recipe.classifier.batch_norm)


def _larger(work: Workload, tried: list[Candidate], asked: Asked, rates: Rates) -> list[str]:
    """Return what would make a setting fit, the cheapest first."""
    found = []
    smallest = min(tried, key=lambda one: one.memory.total)
    capacity, nodes = 1e9 * asked.gpu.memory_gb, asked.cluster.nodes
    while nodes <= MOST_GPUS // asked.cluster.gpus_per_node:
        nodes *= 2
        cluster = Cluster(nodes, asked.cluster.gpus_per_node)
        share, rest = divmod(asked.recipe.data.global_batch, cluster.ranks)
        if rest:
            break
        micro_batch = share if _takes_whole_share(asked.recipe) else 1
        setting = replace(smallest.setting, ranks=cluster.ranks, micro_batch=micro_batch, accumulation=1)
        if candidate(work, setting, cluster, rates, capacity).fits:
            found.append(f"--nodes {nodes}: states are shared out among more GPUs")
            break
    for gpu in sorted(gpus().values(), key=lambda gpu: gpu.memory_gb):
        if any(candidate(work, one.setting, asked.cluster, rates, 1e9 * gpu.memory_gb).fits for one in tried):
            found.append(f"--gpu {gpu.name}: {gpu.memory_gb:g} GB of memory each")
            break
    found.append("a smaller model (model.width, model.depth), or smaller images (model.image_size)")
    return found
