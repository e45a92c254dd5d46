"""Numbers on the device that the host reads later."""

import torch


class HostCopy:
    """A number that is being copied from the device; call it to read it.

    Reading waits for the work that was launched before the copy, and not for later work: a number of step t that is
    read when step t + 1 is launched keeps no device idle.
    """

    def __init__(self, number: torch.Tensor):
        """number: [] on any device; it may change afterwards."""
        self._copied = torch.cuda.Event() if number.is_cuda else None
        self._number = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self._number.copy_(number.detach(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def __call__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._number.item()
