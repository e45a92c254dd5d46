"""How tests decode: on the CPU."""

from data_pipeline.augment.kinds import augmentation
from data_pipeline.dali_graph import Decoding


def on_cpu(image_size: int = 32, kind: str = "random_resized_crop", **options) -> Decoding:
    """Decode on the CPU, cut and augmented by the augmentation named `kind`."""
    return Decoding(augmentation(kind), image_size, device="cpu", **options)
