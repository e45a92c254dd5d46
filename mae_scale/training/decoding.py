"""How a recipe's images are decoded, and what is done with bad ones: the same in training and evaluation."""

from data_pipeline.augment.kinds import Augmentation, SecondView
from data_pipeline.bad_images import BadImagePolicy
from data_pipeline.dali_graph import Decoding
from mae_scale.config.schema import Recipe
from mae_scale.distributed.ranks import Ranks


def decoding_of(recipe: Recipe, augmentation: Augmentation, ranks: Ranks, second: SecondView | None = None) -> Decoding:
    """Return how this rank decodes, on the recipe's device, with a second view where one is given."""
    data = recipe.data
    return Decoding(
        augmentation,
        recipe.model.image_size,
        device=data.device,
        device_id=ranks.local_rank,
        threads=data.threads,
        exif_orientation=data.exif_orientation,
        second=second,
    )


def decoding_on_cpu(recipe: Recipe, augmentation: Augmentation, second: SecondView | None = None) -> Decoding:
    """Return how a few images are decoded for a picture or a statistic, on the CPU."""
    return Decoding(
        augmentation,
        recipe.model.image_size,
        device="cpu",
        exif_orientation=recipe.data.exif_orientation,
        second=second,
    )


def bad_image_policy(recipe: Recipe) -> BadImagePolicy:
    """Return the recipe's limit on bad images, and what it does with them."""
    return BadImagePolicy(recipe.data.bad_image_limit, recipe.data.on_bad_image)
