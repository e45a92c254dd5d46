"""A number that the device computes, for the host to read later."""

import torch


class HostCopy:
    """A number on its way from the device; call it to read it.

    Reading waits for the work that had been launched when the copy was made, and not for what was launched since: a
    number of step t that is read when step t + 1 is launched keeps no device idle.
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
