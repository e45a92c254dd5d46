"""What tests load: batches of 24 images, decoded on the CPU, collected from all ranks."""

from collections import defaultdict

import numpy as np
import torch

from data_pipeline.augment.kinds import augmentation
from data_pipeline.bad_images import DEFAULT_POLICY
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.dali_graph import Decoding
from data_pipeline.loader import ImageLoader

SEED = 11


def on_cpu(image_size: int = 32, kind: str = "random_resized_crop", **options) -> Decoding:
    """Decode on the CPU, cut and augmented by the augmentation named `kind`."""
    return Decoding(augmentation(kind), image_size, device="cpu", **options)


def training(world_size=1, *, micro_batch=None, steps=(0, 4), rank=0, seed=SEED) -> TrainingOrder:
    """The order of batches of 24 images."""
    layout = batch_layout(24, world_size, micro_batch)
    return TrainingOrder(layout, rank, seed=seed, start_step=steps[0], stop_step=steps[1])


def collect(index, world_size=1, decoding=None, bad_images=DEFAULT_POLICY, prefetch=2, **options):
    """Step to (images, labels, sample ids, positions, replaced) of the whole global batch, from all ranks."""
    parts = defaultdict(list)
    for rank in range(world_size):
        order = training(world_size, rank=rank, **options)
        with ImageLoader(index, order, decoding or on_cpu(), bad_images=bad_images, prefetch=prefetch) as loader:
            for batch in loader:
                parts[batch.number].append(batch)
    return {
        step: (
            torch.cat([b.images for b in batches]),
            torch.cat([b.labels for b in batches]),
            np.concatenate([b.sample_ids for b in batches]),
            np.concatenate([b.positions for b in batches]),
            sum(b.replaced for b in batches),
        )
        for step, batches in parts.items()
    }


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a[0], b[0])
        and torch.equal(a[1], b[1])
        and np.array_equal(a[2], b[2])
        and np.array_equal(a[3], b[3])
        and a[4] == b[4]
        for a, b in zip(one.values(), other.values(), strict=True)
    )
