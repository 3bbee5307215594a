"""The masked autoencoder of He et al. 2021: a Vision Transformer and a decoder, around the ops of mae_kernels.

State-dict keys are those of the published code, so its checkpoints load with ``strict=True``.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mae.model.block import Block, linear, of_some
from mae.model.cross import CrossBlock, predicted
from mae.model.sizes import MAEConfig
from mae.model.vit import VisionTransformer, fill_positions, initialize
from mae_kernels import Masking, gather_tokens, linear_masked_mse, masked_mse, patchify, random_masking, unpatchify
from mae_kernels.masked_mse import Target
from mae_kernels.nn import MaskTokenScatter
from mae_kernels.patch_grid import PatchGrid
from mae_kernels.untouched import untouched


class MAEOutput(NamedTuple):
    loss: Tensor  # scalar float32
    pred: Tensor | None  # [N, L, E] with return_pred, else None
    mask: Tensor  # [N, L] bool, True = removed


class Reconstruction(NamedTuple):
    """Pictures of the same images, ``[N, C, H, W]`` or ``[N, C, T, H, W]`` float32 in [0, 1].

    Images with values beyond [0, 1] in the units of the model's pixel_mean, such as 16-bit ones, are scaled by their
    own range, with 0 and 1 in it: each image by that of all its channels and frames.
    """

    masked: Tensor  # the model's input, hidden patches grey
    reconstruction: Tensor  # hidden patches as predicted, visible patches as they were
    original: Tensor
    uses_true_statistics: bool  # predictions un-normalised by the mean and variance of the hidden patches themselves


class MaskedAutoencoder(VisionTransformer):
    """Encoder for visible patches, decoder for all of them, squared error on the hidden ones.

    With the config's decoder ``"cross"`` the decoder is CrossMAE's, :class:`mae.model.cross.CrossBlock`; with a
    predicted_share below 1 the error is that of some hidden patches, :func:`mae.model.cross.predicted`. Neither is the
    published objective.

    Images and arguments: as of :class:`VisionTransformer`.
    """

    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    mask_token_scatter: MaskTokenScatter
    decoder_pos_embed: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear

    def __init__(self, config: MAEConfig, residual_dtype: torch.dtype | None = None) -> None:
        super().__init__(config, residual_dtype)
        dim = config.decoder_embed_dim
        self.decoder_embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token_scatter = MaskTokenScatter(out_dtype=residual_dtype)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, dim), requires_grad=False)
        block = CrossBlock if config.decoder == "cross" else Block
        self.decoder_blocks = nn.ModuleList(
            block(dim, config.decoder_num_heads, config.mlp_ratio) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, config.grid.patch_values)
        self._initialize_decoder()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._initialize_decoder()

    def _initialize_decoder(self) -> None:
        initialize(self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred)
        nn.init.normal_(self.mask_token, std=0.02)
        fill_positions(self.decoder_pos_embed, self.config)

    def forward(  # type: ignore[override]  # of a subclass with a task of its own
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        masking: Masking | None = None,
        return_pred: bool = False,
    ) -> MAEOutput:
        """One pre-training pass.

        Args:
            images: ``[N, C, H, W]`` or ``[N, C, T, H, W]``, uint8, uint16 or normalised floating.
            mask_ratio: share of hidden patches.
            noise: ``[N, L]`` that fixes the mask, see :func:`mae_kernels.random_masking`.
            masking: the mask itself, from any source; mask_ratio and noise are then not used. Where its rows differ in
                their counts, each image gets what it would get alone, and the loss is the mean over all hidden patches.
            return_pred: predict all patches, visible and hidden, and return them. Costs time and memory. What a cross
                decoder says of visible patches it was not trained for.

        Returns:
            :class:`MAEOutput`; the loss is the same number with and without return_pred.
        """
        grid = self.patch_grid(images)
        masking = _masking(images, grid.num_patches, mask_ratio, noise, masking)
        scored = predicted(masking, self.config.predicted_share)
        keys = _padding(masking, grid.num_patches)
        latent = self.encode(self.embed(images, masking.ids_keep), keys)  # [N, 1 + K, D]
        x = self.decoder_input(latent, masking.ids_restore, grid)
        if return_pred:
            hidden = self.decoder_norm(self.decode(x, None, grid, keys))  # [N, 1 + L, D']
            pred = linear(hidden, self.decoder_pred)[:, 1:]  # [N, L, E]
            loss = masked_mse(pred, images, mask=scored.mask, **self._target(images))
            return MAEOutput(loss, pred, masking.mask)
        hidden = self.decode(x, scored.ids_mask, grid, keys)  # [N, M, D']
        return MAEOutput(self.loss(hidden, images, scored.ids_mask), None, masking.mask)

    def decoder_input(self, latent: Tensor, ids_restore: Tensor, grid: PatchGrid) -> Tensor:
        """What :meth:`decode` takes of latent ``[N, 1 + K, D]``.

        All tokens ``[N, 1 + L, D']``, or for a cross decoder the visible ones ``[N, 1 + K, D']``.
        """
        if self.config.decoder == "cross":
            return linear(latent, self.decoder_embed)
        return self.scatter_mask_tokens(latent, ids_restore, grid)

    def scatter_mask_tokens(self, latent: Tensor, ids_restore: Tensor, grid: PatchGrid) -> Tensor:
        """Visible tokens and mask tokens in the places of their patches: ``[N, 1 + K, D]`` -> ``[N, 1 + L, D']``."""
        positions = self.positions(self.decoder_pos_embed, grid)
        return self.mask_token_scatter(linear(latent, self.decoder_embed), self.mask_token, ids_restore, positions)

    def decode(
        self, x: Tensor, ids_mask: Tensor | None = None, grid: PatchGrid | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Hidden states before the final norm, of all tokens ``[N, 1 + L, D']``, or of the patches ids_mask ``[N, M]``.

        For the latter the last block computes keys and values of all tokens, and everything else for these alone; the
        blocks of a cross decoder never compute anything else.

        Args:
            x: as :meth:`decoder_input` makes it.
            ids_mask: -1 is no patch.
            grid, keys: what a cross decoder has to know besides: the images' patches, the config's for None, and which
                tokens are padding, as of :meth:`encode`.
        """
        if self.config.decoder == "cross":
            queries = self._queries(len(x), ids_mask, grid or self.config.grid)
            return functools.reduce(lambda tokens, block: block(tokens, x, keys), self.decoder_blocks, queries)
        ids = None if ids_mask is None else ids_mask + (ids_mask >= 0)  # behind the class token, but for those of none
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            x = of_some(block, x, ids if i == last else None)
        return gather_tokens(x, ids) if last < 0 and ids is not None else x

    def _queries(self, batch_size: int, ids_mask: Tensor | None, grid: PatchGrid) -> Tensor:
        """The mask token at the places of all tokens ``[N, 1 + L, D']``, or of the patches ids_mask ``[N, M, D']``."""
        positions = self.positions(self.decoder_pos_embed, grid)
        if ids_mask is None:
            positions = positions.expand(batch_size, -1, -1)
        else:
            positions = F.embedding(ids_mask + 1, positions[0])  # of an id of -1 any will do: the class token's
        return (positions + self.mask_token).to(self.residual_dtype)

    def loss(self, hidden: Tensor, images: Tensor, ids_mask: Tensor) -> Tensor:
        """Norm, head and squared error of the hidden patches ``[N, M, D']``: scalar float32."""
        head, target = self.decoder_pred, self._target(images)
        hidden = self.decoder_norm(hidden)
        if untouched(head, nn.Linear):
            return linear_masked_mse(hidden, head.weight, head.bias, images, ids_mask, **target)
        return masked_mse(head(hidden), images, ids_mask=ids_mask, **target)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        masking: Masking | None = None,
    ) -> Reconstruction:
        """Hide patches of images, predict them, and return pictures.

        A model trained on normalised pixels (``norm_pix_loss``) predicts neither the mean nor the contrast of a patch.
        Its pictures borrow both from the hidden patch itself, and ``uses_true_statistics`` says so.

        Args: as of :meth:`forward`.

        Returns:
            :class:`Reconstruction`.
        """
        config, embed, grid = self.config, self.patch_embed, self.patch_grid(images)
        masking = _masking(images, grid.num_patches, mask_ratio, noise, masking)
        pred = self.forward(images, masking=masking, return_pred=True).pred
        assert pred is not None
        patches = pred.float()  # [N, L, E]
        mean, std = (x.view(-1, *[1] * (images.ndim - 2)) for x in (embed.pixel_mean, embed.pixel_std) if x is not None)
        pixels = embed.floating_pixels(images).float()  # [N, C, (T,) H, W]
        sizes = config.patch_size, tuple(images.shape[2:])
        if config.norm_pix_loss:
            target = Target.of("MaskedAutoencoder", grid, config.norm_pix_loss)
            patches = _denormalized(patches, patchify(pixels, config.patch_size), config.in_chans, target)
        hidden = unpatchify(masking.mask[..., None].expand(patches.shape), *sizes)  # as pixels
        original, predicted = pixels * std + mean, unpatchify(patches, *sizes) * std + mean
        low, high = original.flatten(1).aminmax(dim=1)
        low, high = (x.view(-1, *[1] * (images.ndim - 1)) for x in (low.clamp(max=0), high.clamp(min=1)))
        original, predicted = (((x - low) / (high - low)).clamp(0, 1) for x in (original, predicted))
        return Reconstruction(
            masked=original.masked_fill(hidden, 0.5),
            reconstruction=torch.where(hidden, predicted, original),
            original=original,
            uses_true_statistics=bool(config.norm_pix_loss),
        )

    def _target(self, images: Tensor) -> dict[str, Any]:
        config = self.config
        normalization = self.patch_embed.normalization(images)
        return {"patch_size": config.patch_size, "norm_pix": config.norm_pix_loss, **normalization}


def _masking(
    images: Tensor, num_patches: int, mask_ratio: float, noise: Tensor | None, masking: Masking | None
) -> Masking:
    if masking is not None:
        if noise is not None:
            raise ValueError("MaskedAutoencoder: pass either noise or masking, got both")
        return masking
    device = images.device if noise is None else None
    return random_masking(images.shape[0], num_patches, mask_ratio, noise=noise, device=device)


def _padding(masking: Masking, num_patches: int) -> Tensor | None:
    """``[N, 1 + K]`` bool, False where ids_keep holds no patch; None where the shapes say that all are patches."""
    if masking.ids_keep.shape[1] + masking.ids_mask.shape[1] == num_patches:
        return None
    return F.pad(masking.ids_keep >= 0, (1, 0), value=True)  # the class token is always one


def _denormalized(patches: Tensor, truth: Tensor, channels: int, target: Target) -> Tensor:
    """Predictions ``[N, L, E]`` with the mean and deviation of the true patches, or of each of their channels."""
    patches, truth = (x.unflatten(2, (-1, target.groups(channels))) for x in (patches, truth))
    eps_of_variance, eps_of_deviation = target.eps_of_variance_and_deviation
    deviation = (truth.var(2, keepdim=True) + eps_of_variance).sqrt() + eps_of_deviation
    return (patches * deviation + truth.mean(2, keepdim=True)).flatten(2)
