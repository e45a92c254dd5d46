"""Masks: the exact count, the promised shape, and nothing but the image's own generator behind them."""

import math
import time

import numpy as np
import pytest
from scipy import ndimage

from data_pipeline.errors import UsageError
from data_pipeline.rng import generator
from mae_scale.models.masking import KINDS, block_masks, kept_patches, mask_noise


def generator_of(position):
    return np.random.Generator(np.random.Philox(key=[7, position]))


def masks(kind, grid_size=14, mask_ratio=0.75, n=64):
    """bool [n, grid, grid], True where removed, by the model's rule."""
    noise = mask_noise(
        kind, grid_size=grid_size, mask_ratio=mask_ratio, generator_of=generator_of, positions=np.arange(n)
    )
    assert noise.dtype == np.float32
    assert noise.shape == (n, grid_size**2)
    order = np.argsort(noise, axis=1, kind="stable")
    removed = np.ones(noise.shape, dtype=bool)
    np.put_along_axis(removed, order[:, : kept_patches(grid_size**2, mask_ratio)], False, axis=1)
    return removed.reshape(n, grid_size, grid_size), noise


@pytest.mark.parametrize("grid_size", [8, 14, 16, 32])
@pytest.mark.parametrize("mask_ratio", [0.4, 0.5, 0.75, 0.9])
def test_block_scores_mark_exactly_the_removed_count(grid_size, mask_ratio):
    removed, noise = masks("block", grid_size, mask_ratio)
    count = grid_size**2 - kept_patches(grid_size**2, mask_ratio)
    assert (noise.sum(axis=1) == count).all()
    assert np.array_equal(removed.reshape(len(noise), -1), noise == 1)


def test_blocks_hang_together_where_random_patches_do_not():
    def pieces(kind):
        removed, _ = masks(kind, mask_ratio=0.5, n=200)
        return np.mean([ndimage.label(one)[1] for one in removed])

    def like_neighbour(kind):
        removed, _ = masks(kind, mask_ratio=0.5, n=200)
        return np.mean(removed[:, :, 1:] == removed[:, :, :-1])

    assert pieces("block") < 3 < pieces("random")
    assert like_neighbour("block") > 0.8
    assert like_neighbour("random") < 0.55


def test_blocks_fall_everywhere():
    removed, _ = masks("block", mask_ratio=0.5, n=500)
    assert removed.mean(axis=0).min() > 0.02
    assert len({one.tobytes() for one in removed}) > 490


@pytest.mark.parametrize(("mask_ratio", "step"), [(0.75, 2), (1 - 1 / 49, 7)])
def test_grid_keeps_one_patch_of_each_square(mask_ratio, step):
    removed, _ = masks("grid", mask_ratio=mask_ratio, n=3)
    kept = ~removed
    assert kept[:, ::step, ::step].all()
    assert kept.sum(axis=(1, 2)).tolist() == [(14 // step) ** 2] * 3


@pytest.mark.parametrize(("grid_size", "mask_ratio"), [(14, 0.5), (14, 0.9), (7, 0.75), (16, 8 / 9)])
def test_grid_refuses_what_no_grid_can_do(grid_size, mask_ratio):
    with pytest.raises(UsageError, match="may be"):
        masks("grid", grid_size, mask_ratio)


def test_random_masks_are_uniform():
    removed, noise = masks("random", n=2000)
    assert ((noise >= 0) & (noise < 1)).all()
    assert np.abs(removed.mean(axis=0) - 0.75).max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_mask_depends_on_its_position_alone(kind):
    whole = mask_noise(kind, grid_size=8, mask_ratio=0.75, generator_of=generator_of, positions=np.arange(12))
    part = mask_noise(kind, grid_size=8, mask_ratio=0.75, generator_of=generator_of, positions=np.array([9, 2, 5]))
    assert np.array_equal(part, whole[[9, 2, 5]])


def test_block_masks_cost_less_than_a_millisecond_an_image():
    start = time.process_time()
    masks("block", grid_size=16, n=256)
    assert (time.process_time() - start) / 256 < 1e-3


def test_unknown_kinds_and_ratios_are_refused():
    with pytest.raises(UsageError, match="random, block, grid"):
        masks("blocks")
    for mask_ratio in (0.0, 1.0, 0.999, -0.5):
        with pytest.raises(UsageError, match="mask_ratio"):
            masks("random", mask_ratio=mask_ratio)


def authors_mask(uniforms: np.ndarray, grid: int, removed: int) -> np.ndarray:
    """A mask of BEiT's generator, patch by patch, from uniforms [attempts, 4]: area, aspect, top, left."""
    mask, attempts = np.zeros((grid, grid), dtype=bool), iter(uniforms)
    while mask.sum() < removed:
        for _ in range(10):
            share, aspect, top, left = next(attempts)
            missing = removed - mask.sum()
            area = 16 + share * (missing - 16)
            ratio = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= grid or width >= grid:
                continue
            top, left = int(top * (grid - height + 1)), int(left * (grid - width + 1))
            block = [(y, x) for y in range(top, top + height) for x in range(left, left + width) if not mask[y, x]]
            if 0 < len(block) <= missing:
                for place in block:
                    mask[place] = True
                break
        else:
            break
    return mask


def test_beits_masks_are_those_of_the_authors_generator():
    positions = np.arange(200)
    masks = block_masks(
        grid_size=14, removed=75, generator_of=lambda group: generator(0, "mask", 3, group), positions=positions
    )
    for position, mask in enumerate(masks):
        draws = generator(0, "mask", 3, position // 64)
        uniforms = np.concatenate([draws.random((64, 32, 4))[position % 64] for _ in range(8)])
        assert np.array_equal(mask.reshape(14, 14), authors_mask(uniforms, 14, 75)), position
    counts = masks.sum(axis=1)
    assert counts.max() == 75
    assert 60 < counts.min() < 75
    assert 74 < counts.mean() < 75


def test_a_beit_mask_is_a_function_of_its_position_alone():
    def masks(positions):
        return block_masks(
            grid_size=14, removed=75, generator_of=lambda group: generator(7, "mask", 0, group), positions=positions
        )

    whole = masks(np.arange(300))
    assert np.array_equal(masks(np.array([299, 5, 64])), whole[[299, 5, 64]])
    assert len(np.unique(whole, axis=0)) == 300
