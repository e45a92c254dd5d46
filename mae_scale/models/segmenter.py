"""UperNet (Xiao et al., arXiv 1807.10221) on a dense encoder: a class for each pixel.

As for BEiT and MAE on ADE20K: maps after four blocks, rescaled by 4, 2, 1 and 1/2 by transposed convolutions and
max-pooling, transformers' UperNetHead, and an auxiliary head on the third map whose loss weighs 0.4. BatchNorm takes
its statistics from the whole global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor
from torch.nn import functional
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from data_pipeline.annotations.label_maps import IGNORED
from mae_scale.models.dense import DenseEncoder, DenseModel, rescalings
from mae_scale.models.global_batch_norm import GlobalBatchNorm2d, with_global_statistics

AUXILIARY_WEIGHT = 0.4


class Segmenter(DenseModel):
    """A dense encoder, four rescaled maps, UperNet's head and the auxiliary one."""

    def __init__(
        self,
        encoder: DenseEncoder,
        *,
        classes: int,
        after: Sequence[int],
        channels: int = 768,
        auxiliary_channels: int = 256,
    ):
        super().__init__()
        width = encoder.size.width
        self.encoder, self.after, self.classes = encoder, tuple(after), classes
        self.scales = rescalings(width, width, width, GlobalBatchNorm2d)
        config = SimpleNamespace(
            pool_scales=(1, 2, 3, 6),
            hidden_size=channels,
            num_labels=classes,
            auxiliary_in_channels=None,
            auxiliary_channels=auxiliary_channels,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.head = with_global_statistics(UperNetHead(config, [width] * 4))
        self.auxiliary = with_global_statistics(UperNetFCNHead(config, [width] * 4, in_index=2))

    def forward(self, images: Tensor, branch_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits float32 [B, C, H, W] of images [B, 3, H, W], and those of the auxiliary head."""
        maps = self._maps(images, branch_scales)
        return _enlarged(self.head(maps), images), _enlarged(self.auxiliary(maps), images)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits float32 [B, C, H, W] of images [B, 3, H, W], of UperNet's head alone."""
        return _enlarged(self.head(self._maps(images, None)), images)

    def _maps(self, images: Tensor, branch_scales: Tensor | None) -> list[Tensor]:
        """Return the maps after the blocks `after`, [B, D, s h, s w] for s = 4, 2, 1, 1/2."""
        maps = self.encoder(images, branch_scales, after=self.after)
        return [scale(one) for scale, one in zip(self.scales, maps, strict=True)]


def _enlarged(logits: Tensor, images: Tensor) -> Tensor:
    return functional.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)


def pixel_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each image's loss float32 [B]: the sum of its pixels' cross-entropies over the number of all its pixels.

    logits [B, C, H, W], labels int64 [B, H, W], IGNORED where a pixel has none. The divisor is that of mmsegmentation
    (avg_non_ignore=False); it is the same for every image, and so the mean over a global batch is that of its parts.
    """
    losses = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return losses.flatten(1).mean(1)
