"""Targets: what they compute, that figures can undo them, and that they travel with the model."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from data_pipeline.errors import UsageError
from mae_scale.models.mae import build_mae
from mae_scale.models.targets import NormalisedPixels, PcaCoefficients, Pixels, Target, fit_pca, make_target

P = 8 * 8 * 3


def patches(n=400, seed=0):
    """fp32 [n, P] with a spectrum that falls, so that the components are well separated."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((P, P)) * (0.97 ** np.arange(P))[:, None]
    return torch.from_numpy((rng.standard_normal((n, P)) @ mixing + 3).astype(np.float32))


def tiny(target, **more):
    return build_mae(
        None,
        image_size=32,
        patch_size=8,
        width=32,
        depth=1,
        heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        target=target,
        **more,
    )


def test_pca_equals_scikit_learns():
    x = patches()
    target = PcaCoefficients(8).fit(x)
    assert target.dim == 96
    theirs = PCA(96, svd_solver="full").fit(x.double().numpy())
    signs = np.sign((theirs.components_ * target.components.numpy()).sum(axis=1))
    np.testing.assert_allclose(target.components.numpy(), theirs.components_ * signs[:, None], atol=1e-5)
    expected = theirs.transform(x.double().numpy()) * signs
    np.testing.assert_allclose(target(x).numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_pca_has_no_free_sign():
    x = patches()
    _, components = fit_pca(x, 20)
    _, again = fit_pca(x.flip(0).numpy(), 20)
    torch.testing.assert_close(components, again)
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_pca_back_projection_is_the_nearest_in_its_space():
    x = patches()
    target = PcaCoefficients(8).fit(x)
    back = target.to_pixels(target(x), x)
    assert (back - x).square().mean() < 0.01 * x.var(dim=0).mean()
    torch.testing.assert_close(target(back), target(x), atol=1e-3, rtol=1e-4)


def test_pca_before_fitting_says_what_to_do():
    model = tiny("pca")
    assert model.head.out_features == 96
    with pytest.raises(UsageError, match="fit"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(UsageError, match="96 components"):
        model.target.fit(patches(50))


def test_pca_travels_in_the_models_weights_and_stays_fp32():
    model = tiny("pca")
    model.target.fit(patches())
    other = tiny("pca")
    other.load_state_dict(tiny("pca").state_dict())
    assert not other.target.fitted
    other.load_state_dict(model.state_dict())
    other.bfloat16()
    assert other.target.fitted
    assert torch.equal(other.target.components, model.target.components)
    assert other(torch.randn(2, 3, 32, 32)).loss.dtype == torch.float32


def test_pca_of_small_patches_keeps_all_their_numbers():
    assert make_target("pca", 4).dim == 48


def test_normalised_pixels_use_the_unbiased_variance():
    x = patches(5).reshape(1, 5, P)
    target = NormalisedPixels(8)
    n = x.numpy()
    expected = (n - n.mean(-1, keepdims=True)) / np.sqrt(n.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target(x).numpy(), expected, atol=1e-5)
    flat = target(torch.full((1, 1, P), 2.0))
    assert torch.isfinite(flat).all()
    torch.testing.assert_close(target.to_pixels(target(x), x), x, atol=1e-4, rtol=0)


def test_pixels_are_the_pixels():
    x = patches(5)
    assert torch.equal(Pixels(8)(x.bfloat16()), x.bfloat16().float())
    assert torch.equal(Pixels(8).to_pixels(x, x), x)


def test_unknown_targets_are_refused_with_the_known():
    with pytest.raises(UsageError, match="pixels, normalised_pixels, pca"):
        make_target("pixel", 16)


def test_words_of_removed_patches_are_predicted_by_cross_entropy():
    model = tiny("tokens", words=5)
    images, noise, words = torch.randn(2, 3, 32, 32), torch.rand(2, 16), torch.randint(5, (2, 16))
    out = model(images, noise, None, words)
    out.loss.backward()
    assert out.prediction.shape == (2, 16, 5)
    each = torch.nn.functional.cross_entropy(out.prediction.transpose(1, 2), words, reduction="none")  # [2, 16]
    torch.testing.assert_close(out.loss, (each * out.mask).sum() / out.mask.sum())
    torch.testing.assert_close(out.loss_per_image, (each * out.mask).sum(1) / out.mask.sum(1))
    with pytest.raises(UsageError, match="has no pixels to draw"):
        model.target.to_pixels(out.prediction, out.prediction)


class _Brightness(Target):
    """A target of a user's own, which looks at all patches: how much brighter than the image each one is."""

    dim = 1

    def of_removed(self, patches, removed):
        brightness = patches.mean(dim=-1) - patches.mean(dim=(1, 2))[:, None]  # [B, L]
        return brightness.gather(1, removed)[..., None]


def test_a_target_of_ones_own_fits_the_interface():
    model = tiny(_Brightness())
    out = model(torch.randn(2, 3, 32, 32))
    out.loss.backward()
    assert out.prediction.shape == (2, 16, 1)
