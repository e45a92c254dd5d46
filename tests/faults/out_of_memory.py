"""`mae-scale` on a device that has no memory for its second step."""

import torch

from mae_scale.cli.main import main
from mae_scale.tasks.mae.objective import Reconstruct

whole, calls = Reconstruct.forward, []


def forward(self, *tensors):
    calls.append(1)
    if len(calls) == 2:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.10 GiB "
            "is free. Process 1 has 78.00 GiB memory in use. If reserved memory is large try setting ..."
        )
    return whole(self, *tensors)


Reconstruct.forward = forward
main()
