"""The loader of an evaluation: every image of an index once, over all ranks, cut as the recipe's model takes them."""

from data_pipeline.augment.kinds import SecondView, augmentation
from data_pipeline.bad_images import BadImagePolicy
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.batches import Annotate
from data_pipeline.index import Index
from data_pipeline.loader import ImageLoader
from mae_scale.config.schema import Recipe
from mae_scale.distributed.ranks import Ranks
from mae_scale.training.decoding import bad_image_policy, decoding_of

BATCH_SIZE = 64


def evaluation_loader(
    recipe: Recipe,
    index: Index,
    ranks: Ranks,
    *,
    kind: str = "evaluation",
    batch_size: int | None = None,
    second: SecondView | None = None,
    bad_images: BadImagePolicy | None = None,
    annotate: Annotate | None = None,
) -> ImageLoader:
    """Return this rank's part of each image once, in batches of engine.micro_batch unless batch_size is given.

    Batches are made of neighbours in the index, so that they are the same ones for any number of ranks. `kind`: the
    augmentation, one of those for evaluation; `second`: the view made beside it; `bad_images`: a policy in place
    of the recipe's; `annotate`: what is annotated, as in ImageLoader.
    """
    order = EvaluationOrder(batch_size or recipe.engine.micro_batch or BATCH_SIZE, ranks.rank, ranks.world_size)
    decoding = decoding_of(recipe, augmentation(kind), ranks, second)
    return ImageLoader(index, order, decoding, annotate=annotate, bad_images=bad_images or bad_image_policy(recipe))
