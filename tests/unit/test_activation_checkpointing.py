"""Activation checkpointing recomputes the blocks it says, and nothing else; the result stays what it was."""

import pytest
import torch
from torch import nn

from mae_scale.engines.activation_checkpointing import checkpoint_activations


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [("none", [1, 1, 1, 1]), ("all", [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2]), ("offload", [2, 2, 2, 2])],
)
def test_each_policy_computes_its_blocks_again_in_the_backward_pass(policy, forwards):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
    x = torch.randn(2, 8, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        y = x
        for block in blocks:
            y = block(y)
        return torch.autograd.grad(y.square().mean(), [x, *blocks.parameters()])

    expected = gradients()
    names = list(blocks.state_dict())
    counts = [0] * len(blocks)
    for number, block in enumerate(blocks):
        block[0].register_forward_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    checkpoint_activations(list(blocks), policy)
    y = x
    for block in blocks:
        y = block(y)
    y.square().mean().backward()
    assert counts == forwards
    assert list(blocks.state_dict()) == names
    for mine, theirs in zip([x.grad, *(p.grad for p in blocks.parameters())], expected, strict=True):
        assert torch.equal(mine, theirs)
