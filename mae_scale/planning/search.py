"""Which settings fit on a GPU, how fast each is, and which to take; throughput from one GPU to thousands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mae_scale.planning.collectives import Cluster
from mae_scale.planning.memory import Memory, Setting, host_bytes, memory_of
from mae_scale.planning.rates import Rates
from mae_scale.planning.step_time import StepTime, step_time
from mae_scale.planning.workload import Workload

POLICIES = ("none", "all")
HOST_MEMORY = 0.8e12
"""Assumed: bytes of a node's memory that its ranks may take with offload."""
NEARLY_AS_FAST = 1.01
"""Of settings within this factor of the fastest the simplest is recommended."""


@dataclass(frozen=True)
class Candidate:
    """A setting with its memory and time."""

    setting: Setting
    memory: Memory
    time: StepTime
    fits: bool

    @property
    def images_per_second(self) -> float:
        """Images per second over all ranks."""
        setting = self.setting
        return setting.ranks * setting.micro_batch * setting.accumulation / self.time.total


@dataclass(frozen=True)
class Choices:
    """What may be chosen for a recipe."""

    stages: Sequence[tuple[int, bool]]
    """ZeRO stages, each without or with offload."""
    micro_batches: Sequence[int]
    """Divisors of a rank's share."""
    compiled: bool
    """True: blocks are compiled, but in ZeRO 3."""


def candidate(work: Workload, setting: Setting, cluster: Cluster, rates: Rates, capacity: float) -> Candidate:
    """Return a setting with its memory and time; capacity: bytes of a GPU's memory."""
    memory = memory_of(work, setting)
    host = host_bytes(work, setting) * cluster.gpus_per_node
    fits = memory.total <= capacity and host <= HOST_MEMORY
    return Candidate(setting, memory, step_time(work, setting, cluster, rates), fits)


def all_candidates(
    work: Workload, base: Setting, cluster: Cluster, rates: Rates, capacity: float, choices: Choices
) -> list[Candidate]:
    """Return every choice for a rank's share of images (base: its micro-batch x accumulation)."""
    share = base.micro_batch * base.accumulation
    found = []
    for stage, offload in choices.stages:
        for policy in POLICIES:
            for micro in choices.micro_batches:
                setting = replace(
                    base,
                    zero_stage=stage,
                    micro_batch=micro,
                    accumulation=share // micro,
                    checkpointing=policy,
                    offload=offload,
                    compiled=choices.compiled and stage != 3,
                )
                found.append(candidate(work, setting, cluster, rates, capacity))
    return found


def largest_that_fit(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return for each stage, offload and policy the largest micro-batch that fits, else the smallest."""
    best: dict[tuple[int, bool, str | int], Candidate] = {}
    for one in candidates:
        key = (one.setting.zero_stage, one.setting.offload, one.setting.checkpointing)
        other = best.get(key)
        if other is None or (one.fits, one.setting.micro_batch * (1 if one.fits else -1)) > (
            other.fits,
            other.setting.micro_batch * (1 if other.fits else -1),
        ):
            best[key] = one
    return list(best.values())


def recommended(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the fastest that fits, or a simpler one that is nearly as fast; None where nothing fits.

    Simpler: no offload, no activation checkpointing, a lower ZeRO stage, then a larger micro-batch.
    """
    fitting = [one for one in candidates if one.fits]
    if not fitting:
        return None
    fastest = min(one.time.total for one in fitting)
    near = [one for one in fitting if one.time.total <= NEARLY_AS_FAST * fastest]
    return min(
        near,
        key=lambda one: (
            one.setting.offload,
            one.setting.checkpointing != "none",
            one.setting.zero_stage,
            -one.setting.micro_batch,
        ),
    )


@dataclass(frozen=True)
class Scale:
    """Throughput on a number of GPUs; efficiency is the rate per GPU over that on the fewest."""

    ranks: int
    images_per_second: float
    efficiency: float


def scaling(
    work: Workload,
    setting: Setting,
    rates: Rates,
    capacity: float,
    *,
    gpus_per_node: int,
    up_to: int,
    global_batch: int | None,
    whole_share: bool = False,
) -> list[Scale]:
    """Return the throughput on 1, 2, 4, ... GPUs, as far as `up_to`.

    global_batch: shared out among the ranks (strong scaling), as far as each has an image, in the largest micro-batches
    that fit into `capacity` bytes; None: each rank has the images and micro-batches of the setting (weak scaling).
    whole_share: a rank's share is one micro-batch; numbers of GPUs where it does not fit are left out.
    """
    found: list[Scale] = []
    ranks = 1
    while ranks <= up_to:
        cluster = Cluster(max(1, ranks // gpus_per_node), min(ranks, gpus_per_node))
        here = replace(setting, ranks=cluster.ranks)
        if global_batch is not None:
            if global_batch < ranks:
                break
            here = _largest(work, here, global_batch // ranks, capacity, whole_share)
        ranks *= 2
        if whole_share and memory_of(work, here).total > capacity:
            continue
        share = here.micro_batch * here.accumulation
        rate = cluster.ranks * share / step_time(work, here, cluster, rates).total
        first = found[0].images_per_second / found[0].ranks if found else rate / cluster.ranks
        found.append(Scale(cluster.ranks, rate, rate / cluster.ranks / first))
    return found


def _largest(work: Workload, setting: Setting, share: int, capacity: float, whole_share: bool) -> Setting:
    """Return the setting for a rank's share of images with the largest micro-batch that fits, else with 1."""
    if whole_share:
        return replace(setting, micro_batch=share, accumulation=1)
    for micro in range(share, 0, -1):
        found = replace(setting, micro_batch=micro, accumulation=share // micro)
        if share % micro == 0 and memory_of(work, found).total <= capacity:
            return found
    return replace(setting, micro_batch=1, accumulation=share)
