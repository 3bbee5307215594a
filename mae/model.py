"""The masked autoencoder of He et al. 2021: a Vision Transformer around the ops of mae_kernels.

State-dict keys are those of the published code, so its checkpoints load with ``strict=True``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from mae.block import Block, of_some
from mae.fields import check_fields
from mae_kernels import (
    Masking,
    gather_tokens,
    linear_masked_mse,
    masked_mse,
    patch_embed,
    patchify,
    random_masking,
    scatter_mask_tokens,
    unpatchify,
)
from mae_kernels.nn import assemble_tokens, floating_pixels, rewritten
from mae_kernels.untouched import projects_patches, untouched

_MOST_PATCHES = 2**20  # whose positions alone take gigabytes, and their attention years


@dataclass(frozen=True)
class MAEConfig:
    """Everything that fixes the architecture and the meaning of pixels. The defaults are ViT-B/16."""

    image_size: int | tuple[int, int] = 224  # pixels, H = W or (H, W)
    patch_size: int | tuple[int, int] = 16  # pixels, ph = pw or (ph, pw)
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    norm_pix_loss: bool = True  # targets normalised per patch: better features, but pictures need the true statistics
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels in [0, 1], applied to uint8 images by the ops
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        try:
            check_fields(vars(self))
        except ValueError as error:
            raise ValueError(f"MAEConfig: {error}") from None
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value, value) if isinstance(value, int) else tuple(value))
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for size, patch, side in zip(self.image_size, self.patch_size, ("height", "width"), strict=True):
            if size % patch:
                raise ValueError(f"MAEConfig: image {side} {size} is not a multiple of the patch {side} {patch}")
        for name, width, heads in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("decoder_embed_dim", self.decoder_embed_dim, self.decoder_num_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(f"MAEConfig: {name} {width} must be a multiple of 4 and of its {heads} heads")
        if self.num_patches > _MOST_PATCHES:
            raise ValueError(f"MAEConfig: an image has {self.num_patches} patches, more than {_MOST_PATCHES}")
        if not len(self.pixel_mean) == len(self.pixel_std) == self.in_chans:
            raise ValueError(
                f"MAEConfig: pixel_mean and pixel_std need {self.in_chans} values, one per channel, "
                f"got {len(self.pixel_mean)} and {len(self.pixel_std)}"
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_values(self) -> int:
        return self.in_chans * self.patch_size[0] * self.patch_size[1]


class MAEOutput(NamedTuple):
    loss: Tensor  # scalar float32
    pred: Tensor | None  # [N, L, E] with return_pred, else None
    mask: Tensor  # [N, L] bool, True = removed


class Reconstruction(NamedTuple):
    """Pictures of the same images, ``[N, C, H, W]`` float32 in [0, 1]."""

    masked: Tensor  # the model's input, hidden patches grey
    reconstruction: Tensor  # hidden patches as predicted, visible patches as they were
    original: Tensor
    uses_true_statistics: bool  # predictions un-normalised by the mean and variance of the hidden patches themselves


class NoDecoderError(RuntimeError):
    """The model's weights came from a checkpoint that holds the encoder alone."""


class PatchEmbed(nn.Module):
    """Projects every patch; :meth:`MaskedAutoencoder.embed` passes it over where nobody would notice."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W], floating -> [N, L, D]
        return self.proj(images).flatten(2).transpose(1, 2)


class MaskedAutoencoder(nn.Module):
    """Encoder for visible patches, decoder for all of them, squared error on the hidden ones.

    Images are ``[N, C, H, W]``: uint8 as they come from a file (normalised inside the ops by the config's pixel_mean
    and pixel_std), or floating and already normalised.

    ``residual_dtype`` is the dtype in which tokens travel between the blocks. None promotes as the published code does:
    float32 under autocast, since the position embeddings are. ``torch.bfloat16`` halves that traffic, and is not exact.
    """

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.config = config
        dim, decoder_dim, num_patches = config.embed_dim, config.decoder_embed_dim, config.num_patches

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, config.decoder_num_heads, config.mlp_ratio) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, config.patch_values)

        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std), persistent=False)
        self.residual_dtype: torch.dtype | None = None
        self.encoder_only = False  # set when the weights came from a checkpoint without a decoder
        self.initialize_weights()

    def _apply(self, fn, recurse=True):
        before = self.pixel_mean, self.pixel_std
        super()._apply(fn, recurse)
        self._write_statistics(self.pixel_mean, before)
        return self

    def _write_statistics(self, like: Tensor, before: Sequence[Tensor] = (None, None)) -> None:
        config = self.config
        self.pixel_mean, self.pixel_std = rewritten(like, before, (config.pixel_mean, config.pixel_std))

    def initialize_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif name == "patch_embed.proj" and isinstance(module, nn.Conv2d):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for table in (self.pos_embed, self.decoder_pos_embed):
            table.data[0, 0] = 0
            table.data[0, 1:] = sincos_pos_embed(table.shape[2], self.config.grid_size)

    def forward(
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
            images: ``[N, C, H, W]``, uint8 or normalised floating.
            mask_ratio: share of hidden patches.
            noise: ``[N, L]`` that fixes the mask, see :func:`mae_kernels.random_masking`.
            masking: the mask itself, from any source; mask_ratio and noise are then not used.
            return_pred: predict the visible patches as well and return them all. Costs time and memory.

        Returns:
            :class:`MAEOutput`; the loss is the same number with and without return_pred.
        """
        masking = self._masking(images, mask_ratio, noise, masking)
        latent = self.encode(self.embed(images, masking.ids_keep))  # [N, 1 + K, D]
        tokens = self.unshuffle(latent, masking.ids_restore)  # [N, 1 + L, D']
        if return_pred:
            hidden = self.decoder_norm(self.decode(tokens))  # [N, 1 + L, D']
            pred = self.decoder_pred(hidden)[:, 1:]  # [N, L, E]
            loss = masked_mse(pred, images, mask=masking.mask, **self._target(images))
            return MAEOutput(loss, pred, masking.mask)
        hidden = self.decode(tokens, masking.ids_mask)  # [N, M, D']
        return MAEOutput(self.loss(hidden, images, masking.ids_mask), None, masking.mask)

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Class token and visible patches (all of them for None): ``[N, 1 + K, D]``."""
        if tuple(images.shape[2:]) != self.config.image_size:
            height, width = self.config.image_size
            raise ValueError(
                f"MaskedAutoencoder: images must be [N, {self.config.in_chans}, {height}, {width}], "
                f"got shape {tuple(images.shape)}; resize them or build the model with another image_size"
            )
        embed, position = self.patch_embed, self.pos_embed[:, 1:]
        prefix = self.cls_token + self.pos_embed[:, :1]
        if untouched(embed, PatchEmbed) and projects_patches(embed.proj):
            weight, bias, stats = embed.proj.weight, embed.proj.bias, self._stats(images)
            return patch_embed(
                images, weight, bias, position, ids_keep, prefix=prefix, out_dtype=self.residual_dtype, **stats
            )
        tokens = embed(floating_pixels(images, **self._stats(images)))  # [N, L, D]
        return assemble_tokens(tokens, position, ids_keep, prefix, self.residual_dtype)

    def encode(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def unshuffle(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """The decoder's input, mask tokens in place: ``[N, 1 + K, D]`` -> ``[N, 1 + L, D']``."""
        if self.encoder_only:
            raise NoDecoderError(
                "MaskedAutoencoder: the checkpoint held the encoder alone, so there is nothing to reconstruct with; "
                "load a checkpoint that includes the decoder (published ones are called *_full or mae_visualize_*)"
            )
        x = self.decoder_embed(latent)
        return scatter_mask_tokens(
            x, self.mask_token, ids_restore, self.decoder_pos_embed, out_dtype=self.residual_dtype
        )

    def decode(self, x: Tensor, ids_mask: Tensor | None = None) -> Tensor:
        """Hidden states before the final norm, of all tokens ``[N, 1 + L, D']``, or of the patches ids_mask ``[N, M]``.

        For the latter the last block computes keys and values of all tokens, and everything else for these alone.
        """
        ids = None if ids_mask is None else ids_mask + 1  # behind the class token
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            x = of_some(block, x, ids if i == last else None)
        return gather_tokens(x, ids) if last < 0 and ids is not None else x

    def loss(self, hidden: Tensor, images: Tensor, ids_mask: Tensor) -> Tensor:
        """Norm, head and squared error of the hidden patches ``[N, M, D']``: scalar float32."""
        head, target = self.decoder_pred, self._target(images)
        hidden = self.decoder_norm(hidden)
        if untouched(head, nn.Linear):
            return linear_masked_mse(hidden, head.weight, head.bias, images, ids_mask, **target)
        return masked_mse(head(hidden), images, ids_mask=ids_mask, **target)

    def forward_features(self, images: Tensor) -> Tensor:
        """Features of whole images for downstream use, nothing masked: ``[N, 1 + L, D]``, class token first."""
        return self.encode(self.embed(images))

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
        masking = self._masking(images, mask_ratio, noise, masking)
        patches = self.forward(images, masking=masking, return_pred=True).pred.float()  # [N, L, E]
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        pixels = floating_pixels(images, **self._stats(images)).float()  # [N, C, H, W]
        patch_size, image_size = self.config.patch_size, self.config.image_size
        if self.config.norm_pix_loss:
            truth = patchify(pixels, patch_size)
            patches = patches * (truth.var(2, keepdim=True) + 1e-6).sqrt() + truth.mean(2, keepdim=True)
        hidden = masking.mask[..., None].expand(-1, -1, patches.shape[2])
        hidden = unpatchify(hidden, patch_size, image_size)  # [N, C, H, W]
        original = (pixels * std + mean).clamp(0, 1)
        predicted = (unpatchify(patches, patch_size, image_size) * std + mean).clamp(0, 1)
        return Reconstruction(
            masked=original.masked_fill(hidden, 0.5),
            reconstruction=torch.where(hidden, predicted, original),
            original=original,
            uses_true_statistics=self.config.norm_pix_loss,
        )

    def _masking(self, images: Tensor, mask_ratio: float, noise: Tensor | None, masking: Masking | None) -> Masking:
        if masking is not None:
            if noise is not None:
                raise ValueError("MaskedAutoencoder: pass either noise or masking, got both")
            return masking
        device = images.device if noise is None else None
        return random_masking(images.shape[0], self.config.num_patches, mask_ratio, noise=noise, device=device)

    def _target(self, images: Tensor) -> dict:
        config = self.config
        return {"patch_size": config.patch_size, "norm_pix": config.norm_pix_loss, **self._stats(images)}

    def _stats(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8:
            return {}
        if self.pixel_mean.is_meta and not images.is_meta:  # load_state_dict(assign=True) gave memory to the rest alone
            self._write_statistics(torch.empty(0, device=images.device))
        return {"mean": self.pixel_mean, "std": self.pixel_std}


def sincos_pos_embed(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed position embedding ``[L, dim]``: the first half of the channels encodes the column, the second the row."""
    frequency = 10000 ** -torch.linspace(0, 1, dim // 4 + 1, dtype=torch.float64)[:-1]  # [dim / 4]
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = position.flatten()[:, None] * frequency  # [L, dim / 4]
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def mae_vit_tiny_patch16(**overrides) -> MaskedAutoencoder:
    return _build({"embed_dim": 192, "depth": 12, "num_heads": 3}, overrides)


def mae_vit_small_patch16(**overrides) -> MaskedAutoencoder:
    return _build({"embed_dim": 384, "depth": 12, "num_heads": 6}, overrides)


def mae_vit_base_patch16(**overrides) -> MaskedAutoencoder:
    return _build({"embed_dim": 768, "depth": 12, "num_heads": 12}, overrides)


def mae_vit_large_patch16(**overrides) -> MaskedAutoencoder:
    return _build({"embed_dim": 1024, "depth": 24, "num_heads": 16}, overrides)


def mae_vit_huge_patch14(**overrides) -> MaskedAutoencoder:
    return _build({"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}, overrides)


def mae_vit_demo_patch7(**overrides) -> MaskedAutoencoder:
    """0.5 M parameters for 28x28 grey images: small enough to learn within minutes on a CPU."""
    demo = {
        "image_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
        "decoder_embed_dim": 48,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
        "pixel_mean": (0.286,),
        "pixel_std": (0.353,),
    }
    return _build(demo, overrides)


def _build(architecture: dict, overrides: dict) -> MaskedAutoencoder:
    return MaskedAutoencoder(MAEConfig(**{**architecture, **overrides}))


MODELS: dict[str, Callable[..., MaskedAutoencoder]] = {
    factory.__name__: factory
    for factory in (
        mae_vit_tiny_patch16,
        mae_vit_small_patch16,
        mae_vit_base_patch16,
        mae_vit_large_patch16,
        mae_vit_huge_patch14,
        mae_vit_demo_patch7,
    )
}
