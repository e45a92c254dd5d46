"""The sections of a recipe that belong to single tasks: the classifier, the detector, the segmenter, MoCo v3, the
tokeniser."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mae_scale.config.section import Section


class StartSection(Section):
    """The weights that a task starts from."""

    weights: Path | None = Field(None, description="starting weights: a file, a checkpoint or a run's folder")
    from_scratch: bool = Field(False, description="train from random weights")


class ClassifierSection(StartSection):
    """The classifier on the encoder, its starting weights, and which part of both is trained."""

    pool: Literal["mean", "cls"] = Field("mean", description="mean of the patch tokens, then a norm; or the cls token")
    batch_norm: bool = Field(False, description="affine-free BatchNorm before the head, over all ranks; frozen encoder")
    trained_blocks: float | None = Field(
        None,
        ge=0,
        description="number of final blocks to train; 0.5: the last block's MLP only; 0: the head alone; null: all",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta distribution; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of the Beta distribution; 0: off")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the moving average of the weights, which is what is evaluated; null: none",
    )


class DenseSection(StartSection):
    """The encoder of whole images, and the limit on contradictory annotations: of detection and of segmentation."""

    pretraining_size: int = Field(
        224, gt=0, description="pixels per side that the positions of the starting weights are of"
    )
    window: int | None = Field(
        14, gt=0, description="side of the windows that most blocks attend within, in patches; null: no windows"
    )
    global_blocks: int = Field(
        4, gt=0, description="number of evenly placed blocks that attend to the whole image, where there are windows"
    )
    bad_annotation_limit: float = Field(
        0.001, ge=0, le=1, description="contradictory annotations, per image, above which a start is refused"
    )


class DetectionSection(DenseSection):
    """Mask R-CNN on the encoder, and the objects that it learns from."""

    annotations: Path | None = Field(None, description="COCO's JSON of the objects in data.root's images")
    val_annotations: Path | None = Field(None, description="COCO's JSON of the objects in data.val_root's images")
    channels: int = Field(256, gt=0, description="channels of the feature pyramid and of the heads")
    proposals: int = Field(1000, gt=0, description="boxes per image that the region proposal network proposes")
    sampled_boxes: int = Field(512, gt=0, description="boxes per image that the box head is trained on")


class SegmentationSection(DenseSection):
    """UperNet on the encoder, and the label maps that it learns from."""

    window: int | None = Field(
        None, gt=0, description="side of the windows that most blocks attend within, in patches; null: no windows"
    )
    labels: Path | None = Field(None, description="folder of the label maps (PNG) of data.root's images")
    val_labels: Path | None = Field(None, description="folder of the label maps (PNG) of data.val_root's images")
    class_names: Path | None = Field(
        None, description="text file of the classes' names, one per line; or ADE20K's objectInfo150.txt"
    )
    maps_after: tuple[int, int, int, int] = Field(
        (3, 5, 7, 11), description="blocks, from 0, whose maps are used; 7, 11, 15, 23 for ViT-L"
    )
    channels: int = Field(768, gt=0, description="channels of UperNet's head")
    auxiliary_channels: int = Field(256, gt=0, description="channels of the auxiliary head")
    evaluation: Literal["sliding", "whole"] = Field(
        "sliding", description="the shorter side as image_size, by overlapping windows; or the whole image, fitted in"
    )
    stride: int | None = Field(
        None, gt=0, description="step of the sliding windows in pixels; null: two thirds of image_size"
    )


class MocoSection(Section):
    """MoCo v3's objective; its views are those of data.augmentation=moco_v3."""

    temperature: float = Field(0.2, gt=0, description="divisor of the similarities of queries and keys")
    momentum: float = Field(
        0.99, ge=0, lt=1, description="decay of the momentum encoder's average at the start; rises to 1 by a cosine"
    )
    hidden: int = Field(4096, gt=0, description="width of the hidden layers of projector and predictor")
    dim: int = Field(256, gt=0, description="width of queries and keys")


class TokeniserSection(Section):
    """The discrete VAE of the words of images: the one that a task takes its targets from, or that task dvae trains."""

    weights: Path | None = Field(
        None, description="tokeniser that a task takes its words from: a file, or the folder of a run of task dvae"
    )
    tokens: Path | None = Field(
        None, description="words of the training images, by `mae-scale tokens`; null: computed while training"
    )
    width: int = Field(256, gt=0, multiple_of=4, description="channels of the first group, for task dvae")
    words: int = Field(8192, gt=1, description="size of the vocabulary, for task dvae")
    blocks_per_group: int = Field(2, gt=0, description="residual blocks in each of the four groups, for task dvae")
    temperature: float = Field(
        0.0625, gt=0, le=1, description="last temperature of the Gumbel-softmax, for task dvae; it begins at 1"
    )
    temperature_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of the schedule in which temperature falls by a cosine, for task dvae",
    )
    kl_weight: float = Field(
        6.6,
        ge=0,
        description="last weight of the divergence from the uniform prior, per word, for task dvae",
    )
    kl_weight_share: float = Field(
        1 / 600,
        ge=0,
        le=1,
        description="share of the schedule in which kl_weight rises from 0 by a cosine, for task dvae",
    )
