"""The masked autoencoder of He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377).

Letters in shapes: B images, L patches of an image, K of them visible, R = L - K removed, p the patch's side
in pixels, D the encoder's width, E the decoder's width, T the target's values per patch (p*p*3 for pixels).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize
from mae_scale.models.masking import check_masking, kept_patches, mask_noise
from mae_scale.models.targets import Target, Words, make_target
from mae_scale.models.vit import (
    Encoder,
    ViTSize,
    check_images,
    gather_tokens,
    init_weights,
    layer_norm,
    make_blocks,
    patchify,
    resolve_size,
    sincos_positions,
)


class Decoder(nn.Module):
    """Light decoder, in which one shared mask token stands for every removed patch.

    Attention has no order of its own and every token carries its position, so tokens stay in the order
    [cls, visible, removed] and need not be put back in image order.
    """

    pos_embed: Tensor

    def __init__(
        self, *, encoder_width: int, width: int, depth: int, heads: int, grid: tuple[int, int], mask_tokens: bool = True
    ):
        super().__init__()
        self.width, self.heads = width, heads
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if mask_tokens else None
        self.register_buffer("pos_embed", torch.tensor(sincos_positions(width, grid)), persistent=False)  # [1 + L, E]
        self.blocks = make_blocks(width, depth, heads)
        self.norm = layer_norm(width)

        self.apply(init_weights)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, removed: Tensor) -> Tensor:
        """Return [B, 1 + L, E], as [cls, visible, removed], of latent [B, 1 + K, D], visible [B, K], removed [B, R].

        Without a mask token of its own, latent is [B, 1 + L, D], in that order already.
        """
        x = self.embed(latent).to(latent.dtype)  # [B, 1 + K, E]
        if self.mask_token is not None:
            mask_tokens = self.mask_token.expand(*removed.shape, -1).to(latent.dtype)  # [B, R, E]
            x = torch.cat([x, mask_tokens], dim=1)  # [B, 1 + L, E]
        cls_position = torch.zeros_like(visible[:, :1])  # [B, 1]
        order = torch.cat([cls_position, 1 + visible, 1 + removed], dim=1)  # [B, 1 + L]
        x = x + self.pos_embed[order].to(latent.dtype)  # [B, 1 + L, E]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MaskedAutoencoderOutput(dict[str, Tensor]):
    """Output of a MaskedAutoencoder: the losses, mask and prediction.

    The loss needs the removed patches' prediction only. The whole prediction is computed at its first use; use it
    inside `torch.no_grad()` unless its gradient is wanted.
    It is a dict because sharding engines look for tensors in tuples, lists and dicts.
    """

    def __init__(self, *, loss_per_patch: Tensor, mask: Tensor, predict: Callable[[], Tensor]):
        super().__init__(loss=loss_per_patch.mean(), loss_per_patch=loss_per_patch, mask=mask)
        self._predict = predict
        self._prediction: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Mean loss over the removed patches, [] fp32."""
        return self["loss"]

    @property
    def loss_per_image(self) -> Tensor:
        """Mean loss over each image's removed patches, [B] fp32."""
        return self["loss_per_patch"].mean(dim=1)

    @property
    def mask(self) -> Tensor:
        """Mask fp32 [B, L], 1 for a removed patch."""
        return self["mask"]

    @property
    def prediction(self) -> Tensor:
        """Prediction [B, L, T] of all patches, in image order."""
        if self._prediction is None:
            self._prediction = self._predict()
        return self._prediction


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, decoder of all, and a loss on the removed ones' targets. See `build_mae`."""

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: ImageSize,
        mask_ratio: float,
        masking: str,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        target: Target,
        encoder_mask_tokens: bool,
        drop_path: float,
    ):
        super().__init__()
        self.mask_ratio, self.masking, self.encoder_mask_tokens = mask_ratio, masking, encoder_mask_tokens
        self.encoder = Encoder(size, image_size=image_size, mask_tokens=encoder_mask_tokens, drop_path=drop_path)
        self.image_size, self.patch_size = self.encoder.image_size, size.patch_size
        self.grid, self.patches = self.encoder.grid, self.encoder.patches
        check_masking(masking, grid_size=self.grid, mask_ratio=mask_ratio)
        self.kept = kept_patches(self.patches, mask_ratio)
        self.decoder = Decoder(
            encoder_width=size.width,
            width=decoder_width,
            depth=decoder_depth,
            heads=decoder_heads,
            grid=self.grid,
            mask_tokens=not encoder_mask_tokens,
        )
        self.head = nn.Linear(decoder_width, target.dim)
        self.head.apply(init_weights)
        self.target = target

    @property
    def predicts_words(self) -> bool:
        """Return whether the targets are words, which forward() is given, and not values of pixels."""
        return isinstance(self.target, Words)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        branch_scales: Tensor | None = None,
        words: Tensor | None = None,
    ) -> MaskedAutoencoderOutput:
        """Reconstruct images [B, 3, H, W] (normalised by ImageNet's mean and standard deviation).

        noise [B, L] decides what is visible: the K patches with the smallest values, the earlier of equal ones first.
        Without it masks are drawn at random from torch's generator.
        branch_scales [B, depth, 2] are the encoder's (stochastic depth); without them nothing is dropped.
        words int64 [B, L] are the patches' words, where they are what is predicted.
        Parameters may be fp32, bf16 or fp16; targets and loss are computed in fp32 from the images as given.
        Raises UsageError when images, noise or branch_scales have another shape.
        """
        self._check(images, noise)
        patches = patchify(images, self.patch_size)  # [B, L, p*p*3]
        if noise is None:
            noise = self._draw_noise(images)  # [B, L]
        order = torch.argsort(noise, dim=1, stable=True)  # [B, L]
        visible, removed = order[:, : self.kept], order[:, self.kept :]  # [B, K], [B, R]
        mask = noise.new_ones(noise.shape, dtype=torch.float32).scatter(1, visible, 0.0)  # [B, L]

        latent = self.encoder(patches, visible, removed, branch_scales)  # [B, 1 + K, D]
        decoded = self.decoder(latent, visible, removed)  # [B, 1 + L, E]
        prediction = self.head(decoded[:, 1 + self.kept :])  # [B, R, T]
        # [B, R, T], or [B, R] of words
        target = self.target.of_removed(patches, removed) if words is None else words.gather(1, removed)
        loss = self.target.loss(prediction, target)  # [B, R]

        def predict() -> Tensor:
            image_order = torch.argsort(order, dim=1)  # [B, L]
            return gather_tokens(self.head(decoded[:, 1:]), image_order)  # [B, L, T]

        return MaskedAutoencoderOutput(loss_per_patch=loss, mask=mask, predict=predict)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the encoder's normed features [B, 1 + L, D] of all patches of images [B, 3, H, W], cls first."""
        self._check(images, None)
        return self.encoder(patchify(images, self.patch_size))

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, the encoder's then the decoder's."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay that have more than one dimension."""
        return {name for name, _ in self.named_parameters() if name.endswith(("cls_token", "mask_token"))}

    def _check(self, images: Tensor, noise: Tensor | None) -> None:
        check_images(images, self.image_size)
        if noise is not None and tuple(noise.shape) != (images.shape[0], self.patches):
            raise UsageError(
                f"noise has shape {tuple(noise.shape)}, expected [{images.shape[0]}, {self.patches}], "
                "one number per patch"
            )

    def _draw_noise(self, images: Tensor) -> Tensor:
        """Draw noise fp32 [B, L] on the images' device, from torch's generator."""
        batch = images.shape[0]
        if self.masking == "random":
            return torch.rand(batch, self.patches, device=images.device)
        seeds = torch.randint(2**62, (batch,), device="cpu").numpy()
        noise = mask_noise(
            self.masking,
            grid_size=self.grid,
            mask_ratio=self.mask_ratio,
            generator_of=lambda position: np.random.default_rng(seeds[position]),
            positions=np.arange(batch),
        )
        return torch.from_numpy(noise).to(images.device)


def build_mae(
    name: str | None = None,
    *,
    image_size: ImageSize = 224,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mask_ratio: float = 0.75,
    masking: str = "random",
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    target: str | Target = "normalised_pixels",
    encoder_mask_tokens: bool = False,
    drop_path: float = 0.0,
    words: int = 8192,
) -> MaskedAutoencoder:
    """Return a masked autoencoder with fresh weights (drawn from torch's generator).

    name: one of `mae_scale.models.vit.SIZES`; patch_size (px), width, depth and heads override it; all
        are needed when name is None.
    image_size: the images' side in pixels, or their (height, width); multiples of the patch size.
    masking: "random", "block" or "grid"; used when forward gets no noise, and to refuse ratios it cannot do.
    target: "pixels", "normalised_pixels", "pca", "tokens" (the words of a tokeniser with `words` of them), or an object
        of `mae_scale.models.targets`.
    encoder_mask_tokens: the slow ablation, where the encoder sees mask tokens in place of removed patches.
    drop_path: the rate of stochastic depth at the encoder's last block; forward drops what its branch_scales say.
    Raises UsageError naming the size that is missing or does not fit.
    """
    size = resolve_size(name, patch_size=patch_size, width=width, depth=depth, heads=heads)
    return MaskedAutoencoder(
        size,
        image_size=image_size,
        mask_ratio=mask_ratio,
        masking=masking,
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
        decoder_heads=decoder_heads,
        target=make_target(target, size.patch_size, words=words),
        encoder_mask_tokens=encoder_mask_tokens,
        drop_path=drop_path,
    )
