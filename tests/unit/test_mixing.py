"""Mixup, cutmix and smoothed targets, beside timm's and torch's."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from torch import nn

from mae_scale.tasks.classification.mixing import Mix, draw_mix, mix_images, soft_targets

SIZE = 32


def draw(positions=range(4000), **options):
    options = {"mixup": 0.8, "cutmix": 1.0, "image_size": SIZE, "seed": 0, "step": 7} | options
    return draw_mix(**options, positions=np.asarray(positions))


def on_torch(mix: Mix) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(mix.share), torch.from_numpy(mix.box)


class Told(Mixup):
    """timm's pairwise mixing with the draws that ours has made."""

    def __init__(self, mix: Mix, **options):
        super().__init__(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair", num_classes=10, **options)
        self.mix = mix

    def _params_per_elem(self, batch_size):
        share = self.mix.share[: 2 * batch_size : 2]
        return share.copy(), (self.mix.box[: 2 * batch_size : 2, 1] > 0)


def test_images_and_targets_are_timms_for_the_same_draws(monkeypatch):
    """timm pairs image i with the last but i, so its batch is ours with each pair's second half from the end."""
    mix = draw(np.arange(16))
    boxes = iter(mix.box[::2][mix.box[::2, 1] > 0])
    images = torch.randn(16, 3, SIZE, SIZE)
    labels = torch.arange(16) % 10
    order = [*range(0, 16, 2), *range(15, 0, -2)]

    def told(shape, lam, **_):
        box = next(boxes)
        return tuple(box), lam

    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", told)
    theirs, targets = Told(mix, label_smoothing=0.1)(images[order].clone(), labels[order])
    assert torch.allclose(mix_images(images, *on_torch(mix))[order], theirs, atol=1e-6)
    ours = soft_targets(labels, 10, label_smoothing=0.1, share=torch.from_numpy(mix.share))
    assert torch.allclose(ours[order], targets, atol=1e-6)
    assert torch.allclose(ours.sum(1), torch.ones(16))


def test_half_of_the_pairs_are_cut_and_shares_have_timms_distribution():
    mix = draw()
    pairs, cut = mix.share[::2], mix.box[::2, 1] > mix.box[::2, 0]
    assert np.array_equal(mix.share[::2], mix.share[1::2])
    assert np.array_equal(mix.box[::2], mix.box[1::2])
    assert 0.45 < cut.mean() < 0.55
    # Beta(0.8, 0.8): mean 0.5, variance 1 / (4 x 2.6)
    assert pairs[~cut].mean() == pytest.approx(0.5, abs=0.02)
    assert pairs[~cut].var() == pytest.approx(1 / 10.4, rel=0.06)
    theirs = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=10)
    np.random.seed(0)
    shares = [cutmix_bbox_and_lam((1, 3, SIZE, SIZE), theirs._params_per_batch()[0])[1] for _ in range(4000)]
    assert pairs[cut].mean() == pytest.approx(np.mean(shares), abs=0.03)
    assert np.quantile(pairs[cut], [0.25, 0.75]) == pytest.approx(np.quantile(shares, [0.25, 0.75]), abs=0.04)


def test_the_share_of_cutmix_is_what_is_left_of_the_image():
    mix = draw(mixup=0.0)
    area = (mix.box[:, 1] - mix.box[:, 0]) * (mix.box[:, 3] - mix.box[:, 2])
    assert np.allclose(mix.share, 1 - area / SIZE**2)
    assert (draw(cutmix=0.0).box == 0).all()


def test_draws_depend_on_seed_step_and_position_alone():
    whole, part = draw(np.arange(40)), draw(np.arange(10, 14))
    assert np.array_equal(part.share, whole.share[10:14])
    assert np.array_equal(part.box, whole.box[10:14])
    for other in ({"step": 8}, {"seed": 1}):
        assert not np.array_equal(draw(np.arange(40), **other).share, whole.share)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_targets_give_torchs_loss(smoothing):
    logits, labels = torch.randn(8, 10), torch.arange(8)
    ours = -(soft_targets(labels, 10, label_smoothing=smoothing, share=None) * logits.log_softmax(1)).sum(1).mean()
    assert ours.item() == pytest.approx(nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels).item(), abs=1e-6)


def test_targets_of_a_mixed_pair_are_timms():
    labels = torch.tensor([3, 5])
    ours = soft_targets(labels, 10, label_smoothing=0.1, share=torch.tensor([0.7, 0.7]))
    assert torch.allclose(ours, mixup_target(labels, 10, lam=0.7, smoothing=0.1), atol=1e-6)
