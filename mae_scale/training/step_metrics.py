"""The metrics of a logged step: loss over all ranks, rates, memory, replaced and cached images."""

import resource
import time

import torch

from data_pipeline.batches import Batch
from data_pipeline.loader import ImageLoader
from mae_scale.distributed.collectives import from_all
from mae_scale.engines.base import StepResult
from mae_scale.planning.flops import mfu
from mae_scale.training.context import RunContext
from mae_scale.training.system_metrics import SystemMetrics


class StepClock:
    """Seconds and steps since the last log line, checkpoint or evaluation; images since the last log line."""

    def __init__(self, global_batch: int):
        self._global_batch = global_batch
        self._counts = [0, 0, 0]
        self.restart(None)

    def restart(self, done: int | None) -> None:
        """Begin to measure after update `done`; None: at the first update, which is not timed by itself."""
        self.began, self.from_step, self.data_wait_s = time.perf_counter(), done, 0.0

    def count(self, batch: Batch) -> None:
        """Note a micro-batch."""
        found = batch.replaced, batch.cache_hits, len(batch.positions)
        self._counts = [a + b for a, b in zip(self._counts, found, strict=True)]

    def take_counts(self) -> list[int]:
        """Return the images replaced, those from the cache, and all, since the last call."""
        counts, self._counts = self._counts, [0, 0, 0]
        return counts

    def rates(self, done: int) -> dict[str, float]:
        """Return perf/... since the last call; to be called when the device has finished step `done`."""
        if self.from_step is None:
            self.from_step = done - 1
        steps = max(1, done - self.from_step)
        step_time = (time.perf_counter() - self.began) / steps
        rates = {
            "perf/images_per_second": self._global_batch / step_time,
            "perf/step_time_s": step_time,
            "perf/data_wait_s": self.data_wait_s / steps,
        }
        self.restart(done)
        return rates


def step_metrics(
    context: RunContext, result: StepResult, loader: ImageLoader, clock: StepClock, system: SystemMetrics, *, done: int
) -> dict[str, float]:
    """Return the metrics of step `done`. All ranks call it; the host waits for the device.

    Raises RunError when more images are bad than the recipe allows.
    """
    counts = torch.tensor(
        [len(loader.bad_images.found), *clock.take_counts(), *system.mine()],
        device=context.device,
        dtype=torch.float32,
    )
    shared = torch.cat([result.loss.reshape(1), counts])
    torch.distributed.all_reduce(shared)
    loss, bad_images, replaced, cache_hits, images, *of_nodes = shared.tolist()
    world_size = context.ranks.world_size
    if bad_images > loader.bad_images.allowed:
        # Each rank has counted its own, and one may be another's too: look at the names.
        found = from_all(lambda: loader.bad_images.found)
        loader.bad_images.check({name: reason for part in found for name, reason in part.items()})
    rates, seen = clock.rates(done), done * context.layout.global_batch
    metrics = {
        "train/loss": loss / world_size,
        "train/lr": context.learning_rate(done - 1),
        "train/grad_norm": result.grad_norm(),
        **rates,
        "memory/peak_gib": _peak_gib(context.device),
        "images_seen": seen,
        "compute_pflops": seen * context.training_flops / 1e15,
        **_faults(context, int(replaced)),
        **system.named(of_nodes),
    }
    if context.recipe.data.cache is not None:
        metrics["data/cache_hits"] = cache_hits / images
    if context.peak_flops_per_s:
        metrics["perf/mfu"] = mfu(
            rates["perf/images_per_second"],
            training_flops=context.training_flops,
            peak_flops_per_s=context.peak_flops_per_s,
            devices=world_size,
        )
    return metrics


def _faults(context: RunContext, replaced: int) -> dict[str, float]:
    """Return the counters of what has gone wrong: those that are not 0, so that no chart shows a flat line."""
    counts = {
        "data/replaced_images": replaced,
        "faults/skipped_steps": context.events.count("skipped_step"),
        "faults/rollbacks": context.events.count("rollback"),
    }
    return {name: count for name, count in counts.items() if count}


def _peak_gib(device: torch.device) -> float:
    """Return the peak memory: torch's on the GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
