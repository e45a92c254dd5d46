"""One of several ranks that normalises its share of a batch of maps: CASES.json OUT.json, as run_worker starts it.

Rank 0 writes what all ranks have found: the outputs, the gradients of their inputs, and the running averages.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.models.global_batch_norm import GlobalBatchNorm2d

CHANNELS = 6


def maps(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of maps [4, CHANNELS, 5, 3], each image with another mean, and the gradient of what they become."""
    draws = torch.Generator().manual_seed(seed)
    shift = torch.arange(4.0)[:, None, None, None]
    return (torch.randn(4, CHANNELS, 5, 3, generator=draws) + shift, torch.randn(4, CHANNELS, 5, 3, generator=draws))


def main() -> None:
    case, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = ranks_from_environment()
    with process_group(ranks, 120):
        norm, found = GlobalBatchNorm2d(CHANNELS), {}
        share = slice(ranks.rank * 4 // ranks.world_size, (ranks.rank + 1) * 4 // ranks.world_size)
        for seed in range(case["steps"]):
            x, grad = (part[share].clone() for part in maps(seed))
            result = norm(x.requires_grad_())
            result.backward(grad)
            for name, mine in (("outputs", result.detach()), ("gradients", x.grad)):
                parts = [torch.empty_like(mine) for _ in range(ranks.world_size)]
                dist.all_gather(parts, mine.contiguous())
                found[name] = torch.cat(parts).tolist()
        found |= {"mean": norm.running_mean.tolist(), "var": norm.running_var.tolist()}
        if ranks.rank == 0:
            out.write_text(json.dumps(found))
        dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
