"""BatchNorm of maps over two ranks is torch's over the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.integration.batch_norm_worker import CHANNELS, maps
from tests.integration.ranks import run_worker

WORKER, STEPS = Path(__file__).with_name("batch_norm_worker.py"), 3


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_gradients_and_running_averages_are_those_of_the_global_batch(ranks, tmp_path):
    found = {name: torch.tensor(v) for name, v in run_worker(WORKER, {"steps": STEPS}, ranks, tmp_path).items()}
    whole = nn.BatchNorm2d(CHANNELS)
    for seed in range(STEPS):
        x, grad = maps(seed)
        result = whole(x.requires_grad_())
        result.backward(grad)
    expected = {"outputs": result, "gradients": x.grad, "mean": whole.running_mean, "var": whole.running_var}
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-5), name
