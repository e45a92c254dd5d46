"""The figures show what they say: grey where removed, the original where visible, else the prediction."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mae_scale.reports import pretraining
from mae_scale.reports.pretraining import loss_curve_figure, reconstruction_figure, words_figure
from mae_scale.reports.style import MEAN, STD

P = 16


def normalised(pictures):
    """[N, H, W, 3] in [0, 1] to [N, 3, H, W]."""
    return ((pictures - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)


def patches_of(images):
    """[N, 3, H, W] to [N, L, p*p*3], values in the order height, width, channel; written patch by patch."""
    n, _, height, width = images.shape
    patches = [
        images[:, :, top : top + P, left : left + P].transpose(0, 2, 3, 1).reshape(n, -1)
        for top in range(0, height, P)
        for left in range(0, width, P)
    ]
    return np.stack(patches, axis=1)


@pytest.fixture
def drawn(monkeypatch):
    """What the figure is made of, before it is drawn."""
    caught = []
    draw = pretraining._draw_bands
    monkeypatch.setattr(
        pretraining, "_draw_bands", lambda pictures, *rest: (caught.extend(pictures), draw(pictures, *rest))
    )
    return caught


def test_reconstruction_pastes_predictions_where_patches_were_removed(tmp_path, drawn):
    rng = np.random.default_rng(0)
    truth, guess = rng.random((2, 8, 64, 64, 3))
    mask = (rng.random((8, 16)) < 0.75).astype(np.float32)
    prediction = patches_of(normalised(guess))
    path = tmp_path / "figures" / "reconstruction.png"
    reconstruction_figure(
        torch.tensor(normalised(truth)),
        torch.tensor(mask),
        torch.tensor(prediction),
        path,
        patch_size=P,
    )
    removed = np.kron(mask.reshape(8, 4, 4), np.ones((1, P, P)))[..., None].astype(bool)
    factor = math.ceil(pretraining.SMALLEST_SIDE / 64)
    original, masked, reconstructed = (picture[:, ::factor, ::factor] for picture in drawn)
    np.testing.assert_allclose(original, truth, atol=1e-5)
    np.testing.assert_allclose(masked, np.where(removed, 0.5, truth), atol=1e-5)
    np.testing.assert_allclose(reconstructed, np.where(removed, guess, truth), atol=1e-5)
    with Image.open(path) as png:
        assert png.format == "PNG"
        assert png.width > 8 * 64 * factor
        assert png.height > 3 * 64 * factor


def test_more_than_eight_images_are_continued_below(tmp_path):
    sizes = []
    for count in (8, 9):
        images = np.zeros((count, 3, 128, 128), np.float32)
        path = tmp_path / f"{count}.png"
        reconstruction_figure(images, np.ones((count, 64)), patches_of(images), path, patch_size=P)
        with Image.open(path) as png:
            sizes.append(png.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 1.9 * sizes[0][1]


def test_shapes_that_do_not_belong_together_are_named(tmp_path):
    images = np.zeros((2, 3, 64, 64), np.float32)
    with pytest.raises(ValueError, match=r"\(2, 16, 768\)"):
        reconstruction_figure(images, np.ones((2, 16)), np.zeros((2, 4, 768)), tmp_path / "x", patch_size=P)


def test_prediction_that_is_not_finite_does_not_stop_the_run(tmp_path):
    images = np.zeros((2, 3, 64, 64), np.float32)
    prediction = np.full((2, 16, 768), np.nan, np.float32)
    reconstruction_figure(images, np.ones((2, 16)), prediction, tmp_path / "x.png", patch_size=P)


def test_loss_curve_has_loss_and_learning_rate_against_the_epoch(tmp_path, monkeypatch):
    caught = []
    save = pretraining.save_png
    monkeypatch.setattr(pretraining, "save_png", lambda figure, path: (caught.append(figure), save(figure, path)))
    rows = [
        {"step": 1, "epoch": 0.5, "train/loss": 2.0, "train/lr": 1e-4},
        {"step": 2, "epoch": 1.0, "train/loss": math.nan, "train/lr": 2e-4},
        {"step": 3, "epoch": 1.5, "train/loss": 1.0, "train/lr": 1e-4, "val/loss": 1.5},
    ]
    loss_curve_figure(rows, tmp_path / "loss.png")
    loss, val, lr = (line.get_xydata().tolist() for axes in caught[0].axes for line in axes.lines)
    assert loss == [[0.5, 2.0], [1.5, 1.0]]
    assert val == [[1.5, 1.5]]
    assert lr == [[0.5, 1e-4], [1.0, 2e-4], [1.5, 1e-4]]
    with Image.open(tmp_path / "loss.png") as png:
        assert png.format == "PNG"


def test_loss_curve_of_no_rows_is_an_empty_figure(tmp_path):
    loss_curve_figure([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_images_and_what_their_words_say_are_drawn_one_above_the_other(tmp_path, drawn):
    rng = np.random.default_rng(0)
    original, decoded = rng.random((2, 3, 32, 32, 3)).astype(np.float32)
    words_figure(normalised(original), torch.from_numpy(decoded.transpose(0, 3, 1, 2)), tmp_path / "words.png")
    for pictures, expected in zip(drawn, (original, decoded), strict=True):
        assert np.allclose(pictures[:, ::4, ::4], expected, atol=1e-5)  # each pixel is a square of 4 x 4
    with Image.open(tmp_path / "words.png") as picture:
        assert picture.height > 2 * 128
