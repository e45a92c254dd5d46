"""The time of collectives over two levels of links: within a node, and between nodes.

A ring over n ranks sends 2 S (n - 1) / n bytes per rank in an all-reduce of S bytes, half of that in a reduce-scatter
or an all-gather (Patarasuk and Yuan, 2009). Of a ring over several nodes each node's links carry the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mae_scale.planning.rates import Rates


@dataclass(frozen=True)
class Cluster:
    """Nodes with the same number of GPUs, a rank each."""

    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


def all_gather_s(size: float, cluster: Cluster, rates: Rates, *, messages: float = 1) -> float:
    """Return the seconds of an all-gather, or of a reduce-scatter, of `size` bytes in so many messages."""
    if cluster.ranks == 1 or not size:
        return 0.0
    share = (cluster.ranks - 1) / cluster.ranks
    within = size * share / rates.node_link_bytes_per_s if cluster.gpus_per_node > 1 else 0.0
    between = size * share / rates.link_bytes_per_s if cluster.nodes > 1 else 0.0
    # Within a node as a ring, between nodes as a tree: NCCL takes trees where rings would wait for many messages.
    latency = (cluster.gpus_per_node - 1) * rates.node_link_latency_s
    latency += math.ceil(math.log2(cluster.nodes)) * rates.link_latency_s
    return max(within, between) + messages * latency


def all_reduce_s(size: float, cluster: Cluster, rates: Rates, *, messages: float = 1) -> float:
    """Return the seconds of an all-reduce of `size` bytes in so many messages."""
    return 2 * all_gather_s(size, cluster, rates, messages=messages)
