"""The sections that every recipe has: model, data, optimiser, schedule, engine, checkpoints, tracking."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_serializer, field_validator
from pydantic_core import PydanticCustomError

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize, height_and_width, shortest_form, size_value
from mae_scale.config.section import Section
from mae_scale.passwords import without_password


class ModelSection(Section):
    """The autoencoder, or a classifier's encoder; `name` sets patch size, width, depth and heads."""

    name: str | None = Field(
        "vit_large_patch16", description="vit_base_patch16, vit_large_patch16, vit_huge_patch14; null: the sizes below"
    )
    encoder: Literal["vit", "beit"] = Field(
        "vit", description="beit: attention biased by relative position, LayerScale"
    )
    image_size: ImageSize = Field(224, description="pixels per side; or [height, width], both multiples of patch_size")
    patch_size: int | None = Field(None, gt=0, description="pixels per side; null: the model's")
    width: int | None = Field(None, gt=0, description="size of a token; null: the model's")
    depth: int | None = Field(None, gt=0, description="number of blocks; null: the model's")
    heads: int | None = Field(None, gt=0, description="attention heads per block; null: the model's")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of removed patches")
    masking: Literal["random", "block", "grid"] = Field("random", description="how patches are chosen for removal")
    encoder_mask_tokens: bool = Field(False, description="encode mask tokens too, as the paper's ablation does")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth: rate at the encoder's last block")
    layer_scale: float | None = Field(
        None, gt=0, description="encoder: beit's initial scale of each branch: 0.1 for B, 1e-5 for L"
    )
    decoder_depth: int = Field(8, gt=0, description="number of decoder blocks")
    decoder_width: int = Field(512, gt=0, description="size of a token in the decoder")
    decoder_heads: int = Field(16, gt=0, description="attention heads per decoder block")
    target: Literal["pixels", "normalised_pixels", "pca", "tokens"] = Field(
        "normalised_pixels", description="what is predicted for each removed patch; tokens: a tokeniser's words"
    )

    @field_validator("image_size", mode="wrap")
    @classmethod
    def _square_or_pair(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> ImageSize:
        """Return the size in its shortest form: [224, 224] is 224."""
        try:
            found: ImageSize = handler(value)
            if min(height_and_width(found)) > 0:
                return shortest_form(found)
        except ValidationError:
            pass
        raise PydanticCustomError(
            "image_size", "expected pixels per side, such as 224, or [height, width], such as [224, 448]"
        )

    @property
    def square_side(self) -> int:
        """The side in pixels, for what takes square images only; UsageError where they are not."""
        if isinstance(self.image_size, int):
            return self.image_size
        raise UsageError(
            f"model.image_size={size_value(self.image_size)}: only square images are taken here; use one number, such "
            f"as {max(self.image_size)}"
        )


class DataSection(Section):
    """The images, and how batches are made of them."""

    root: Path | None = Field(None, description="training images: a folder, a folder per class, or tar shards")
    val_root: Path | None = Field(None, description="validation images, in the same forms")
    index: Path | None = Field(None, description="index file; null: beside the data")
    augmentation: Literal[
        "random_resized_crop",
        "random_resized_crop_color_jitter",
        "fixed_crop",
        "none",
        "rand_augment",
        "moco_v3",
        "large_scale_jitter",
        "scale_jitter",
    ] = Field(
        "random_resized_crop",
        description="none: centre crop; rand_augment: fine-tuning's, rand-m9-mstd0.5-inc1; moco_v3: crops of 8 to "
        "100 % of the area, colour jitter with hue, grey, blur; large_scale_jitter: detection's, resized by 0.1 to 2 "
        "of what fits; scale_jitter: segmentation's, the shorter side resized by 0.5 to 2, colour jitter",
    )
    crop_scale: float | None = Field(
        None, gt=0, le=1, description="smallest crop as a share of the area; null: the augmentation's own"
    )
    scale_range: tuple[float, float] | None = Field(
        None, description="smallest and largest factor of large_scale_jitter or scale_jitter; null: its own"
    )
    flip: float | None = Field(
        None, ge=0, le=1, description="probability of a horizontal flip; null: the augmentation's own"
    )
    exif_orientation: bool = Field(
        False, description="turn images upright by their EXIF orientation; false: take them as stored"
    )
    random_erasing: float = Field(0.0, ge=0, le=1, description="probability of filling a rectangle with noise")
    labels_per_class: int | None = Field(None, gt=0, description="train on this many images per class, drawn by seed")
    fraction: float | None = Field(
        None, gt=0, le=1, description="train on this share of the images, drawn by seed; a larger one contains it"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="where images are decoded; auto: on a GPU where there is one"
    )
    threads: int = Field(4, gt=0, description="decoding threads per rank")
    cache: Path | None = Field(None, description="folder on the node's own disk that keeps each image once read")
    cache_gib: float | None = Field(
        None, gt=0, description="size limit of data.cache in GiB; null: until 10 % of the disk is free"
    )
    global_batch: int = Field(4096, gt=0, description="images per update, over all ranks")
    on_bad_image: Literal["replace", "stop"] = Field(
        "replace", description="replace an unreadable image by the next readable one, or stop"
    )
    bad_image_limit: float = Field(0.001, ge=0, le=1, description="share of bad images above which the run stops")


class OptimSection(Section):
    """lr = base_lr x global_batch / 256."""

    name: Literal["adamw", "lars"] = Field("adamw", description="lars: for linear probing")
    base_lr: float = Field(1.5e-4, gt=0, description="peak learning rate per 256 images of the global batch")
    weight_decay: float = Field(
        0.05, ge=0, description="not applied to biases, norms, cls and mask tokens, except BEiT's mask token"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="coefficients of AdamW")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of LARS")
    layer_decay: float = Field(1.0, gt=0, le=1, description="layer-wise lr decay factor (1: none)")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest L2 norm of the gradient; null: no clipping")


class ScheduleSection(Section):
    """Linear warm-up, then the shape of the decay, to the end of the last epoch; set every step."""

    epochs: int = Field(800, gt=0, description="length of the schedule")
    warmup_epochs: int | float = Field(40, ge=0, description="epochs of linear warm-up")
    shape: Literal["cosine", "linear", "steps"] = Field(
        "cosine", description="half-cycle cosine to 0; a line to 0; or a tenth of it from each of step_epochs on"
    )
    step_epochs: tuple[float, ...] = Field((), description="epochs from which on the rate is a tenth, for shape=steps")
    stop_after_steps: int | None = Field(
        None, gt=0, description="end after this many steps, without changing the schedule"
    )


class EngineSection(Section):
    """How the computation is distributed over devices; nothing here changes what is computed."""

    backend: Literal["deepspeed", "fairscale"] = Field("deepspeed", description="library that shards")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="sharded: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too"
    )
    offload: bool = Field(False, description="keep parameters and optimiser state in host memory (ZeRO 3)")
    config: Path | None = Field(None, description="DeepSpeed file to use instead of those in ds_configs/")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="null: bf16 on a GPU, else fp32")
    micro_batch: int | None = Field(
        None, gt=0, description="maximum number of images per forward pass; null: the rank's whole share"
    )
    compile: bool | None = Field(
        None, description="compile the transformer blocks; null: on a GPU, but not under ZeRO 3"
    )
    activation_checkpointing: Literal["none", "all", "offload"] | int = Field(
        "none", description="none; all blocks; n: every n-th block; offload: all, with their inputs kept in host memory"
    )
    collective_timeout_s: float = Field(
        600, gt=0, description="seconds after which a rank that does not answer is lost"
    )

    @field_validator("activation_checkpointing")
    @classmethod
    def _at_least_every_second(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("every n-th block needs n of at least 1")
        return value


class CheckpointSection(Section):
    """When checkpoints are written, which are kept, and when the run rolls back to one."""

    every_steps: int | None = Field(None, gt=0, description="interval in steps")
    every_epochs: int | None = Field(1, gt=0, description="interval in epochs; the last step is always saved")
    keep: int = Field(2, gt=0, description="number of newest checkpoints to keep")
    keep_every_epochs: int | None = Field(None, gt=0, description="also keep those of every n-th epoch")
    keep_best: (
        Literal["train/loss", "val/loss", "val/top1", "val/knn_top1", "val/box_ap", "val/mask_ap", "val/mean_iou"]
        | None
    ) = Field(
        None,
        description="also keep the best one by this metric: the mean training loss since its predecessor (true means "
        "this too), or what was measured on data.val_root at its step",
    )
    background: bool = Field(True, description="write while training goes on; needs host memory for the rank's shard")
    rollback_after_skips: int = Field(
        20, gt=0, description="number of consecutive steps with non-finite gradients before the run rolls back"
    )
    max_rollbacks: int = Field(3, ge=0, description="maximum number of rollbacks; one more stops the run")

    @field_validator("keep_best", mode="before")
    @classmethod
    def _by_training_loss(cls, value: Any) -> Any:
        return {True: "train/loss", False: None}[value] if isinstance(value, bool) else value


class TrackingSection(Section):
    """MLflow and the log."""

    uri: str | None = Field(
        None,
        description="MLflow URI; null: MLFLOW_TRACKING_URI, else SQLite beside the output folder; off: none",
    )
    experiment: str = Field("mae-scale", description="MLflow experiment")
    run_name: str | None = Field(
        None, description="name of the MLflow run; null: the output folder's, with kind, size and seed"
    )
    sweep: str | None = Field(
        None,
        pattern=r"^[\w.+\- ]+$",
        description="name of the sweep that the run belongs to: a child of its parent run; set by mae-scale sweep",
    )
    registered_model: str | None = Field(
        None, description="name of the classifier in MLflow's model registry; null: logged to the run only"
    )
    rates: Path | None = Field(
        None,
        description="rates measured by `mae-scale plan --measure`, to plan each start by; null: the GPU's data sheet",
    )
    log_every_steps: int = Field(20, gt=0, description="interval of log lines and metrics")
    evaluate_every_epochs: int = Field(
        1, gt=0, description="interval of evaluation on data.val_root; also at the end of the schedule"
    )
    knn_images: int | None = Field(
        None,
        gt=0,
        description="evaluate k-NN too in pre-training, by the features of this many training images; null: not",
    )
    reconstruct_every_epochs: int = Field(
        20, gt=0, description="interval of drawing reconstructions; also at the end of each start"
    )

    @field_validator("uri", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value

    @field_serializer("uri")
    def _stored(self, uri: str | None) -> str | None:
        """Return the URI without its password, for all that is written: recipe.yaml, checkpoints, MLflow."""
        return uri and without_password(uri)
