"""How busy the nodes are: CPU, memory, network and GPUs, under the names of MLflow's own system metrics.

MLflow samples the process that logs, which is one node of many. Here each node's values travel in the sum over all
ranks that a logged step makes anyway, and are written beside its other metrics.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import psutil
import torch

from mae_scale.distributed.collectives import from_all
from mae_scale.distributed.ranks import Ranks

INTERVAL_S = 30.0
"""Shortest time between two rows that have them: 64 nodes have 448 values."""
MEGA = 1e6
HOST = (
    "cpu_utilization_percentage",
    "system_memory_usage_percentage",
    "network_receive_megabytes_per_second",
    "network_transmit_megabytes_per_second",
)
GPU = ("gpu_utilization_percentage", "gpu_memory_usage_percentage", "gpu_power_usage_watts")
"""Means over the node's GPUs."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run: the ranks of each stand beside each other, from its local rank 0 on."""

    count: int
    mine: int
    """Number of this rank's node, from 0."""
    ranks_here: int
    """Number of ranks of this rank's node."""

    @classmethod
    def of(cls, rank: int, local_ranks: list[int]) -> Nodes:
        """Return the nodes as a rank sees them."""
        numbers, node = [], -1
        for local_rank in local_ranks:
            node += local_rank == 0
            numbers.append(max(node, 0))
        return cls(max(numbers) + 1, numbers[rank], numbers.count(numbers[rank]))


class SystemMetrics:
    """This rank's part of the nodes' metrics. All ranks make one, and call it alike."""

    def __init__(self, ranks: Ranks, device: torch.device):
        """Begin to measure. Meets the other ranks once."""
        self._nodes = Nodes.of(ranks.rank, from_all(lambda: ranks.local_rank))
        self._device, self._is_first_here = device, ranks.local_rank == 0
        self._names = (*HOST, *GPU) if device.type == "cuda" else HOST
        self._shown_at = -math.inf
        self._network_before = (time.monotonic(), 0, 0)
        self._host()

    @property
    def size(self) -> int:
        """Return the number of values of all nodes."""
        return self._nodes.count * len(self._names)

    def mine(self) -> list[float]:
        """Return this rank's part of the values of all nodes: their sum over the ranks are the values.

        CPU and network since the call before.
        """
        values = [0.0] * self.size
        begin = self._nodes.mine * len(self._names)
        if self._is_first_here:
            values[begin : begin + len(HOST)] = self._host()
        if self._device.type == "cuda":
            shares = [value / self._nodes.ranks_here for value in _gpu(self._device)]
            values[begin + len(HOST) : begin + len(self._names)] = shares
        return values

    def named(self, values: list[float]) -> dict[str, float]:
        """Return the summed values by name, `system/...`; nothing within INTERVAL_S of the last ones."""
        if time.monotonic() - self._shown_at < INTERVAL_S:
            return {}
        self._shown_at = time.monotonic()
        several = self._nodes.count > 1
        names = [
            f"system/{f'node_{node}/' if several else ''}{name}"
            for node in range(self._nodes.count)
            for name in self._names
        ]
        return {name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}

    def _host(self) -> list[float]:
        """Return this node's values of HOST: CPU and network since the call before."""
        found = psutil.net_io_counters()
        now = (time.monotonic(), found.bytes_recv, found.bytes_sent) if found else (time.monotonic(), 0, 0)
        before, self._network_before = self._network_before, now
        seconds = max(now[0] - before[0], 1e-3)
        return [
            psutil.cpu_percent(),
            psutil.virtual_memory().percent,
            (now[1] - before[1]) / seconds / MEGA,
            (now[2] - before[2]) / seconds / MEGA,
        ]


def _gpu(device: torch.device) -> list[float]:
    """Return the values of GPU of a device; NaN for what needs NVIDIA's pynvml where it is not installed."""
    free, total = torch.cuda.mem_get_info(device)
    used = 100 * (1 - free / total)
    try:
        return [float(torch.cuda.utilization(device)), used, torch.cuda.power_draw(device) / 1000]
    except (ModuleNotFoundError, RuntimeError):  # no pynvml, or a driver that does not answer it
        return [math.nan, used, math.nan]
