"""The ops as modules, for people who write their own model.

A module owns what it owns in the published code and no more: ``MaskedPatchEmbed`` the projection. Class token, mask
token and position embeddings belong to the model and are passed in, so a model that keeps them under their published
names, and calls its ``MaskedPatchEmbed`` ``patch_embed``, has the published state-dict keys::

    self.patch_embed = MaskedPatchEmbed(16, 3, 768)                # patch_embed.proj.weight, patch_embed.proj.bias
    self.cls_token = learned_token(768)                            # cls_token
    self.pos_embed = nn.Parameter(...)                             # pos_embed [1, 1 + L, 768]
    self.mask_token = learned_token(512)                           # mask_token
    self.decoder_pos_embed = nn.Parameter(...)                     # decoder_pos_embed [1, 1 + L, 512]
    self.scatter, self.loss = MaskTokenScatter(), MaskedMSELoss(16)

    m = random_masking(len(images), L, device=images.device)
    x = self.patch_embed(images, m.ids_keep, prefix=self.cls_token, pos_embed=self.pos_embed)
    x = self.scatter(x, self.mask_token, m.ids_restore, self.decoder_pos_embed)
    loss = self.loss(pred, images, mask=m.mask)
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from . import checks
from .gather_tokens import gather_tokens
from .masked_mse import NormPix, masked_mse
from .patch_embed import patch_embed
from .patch_grid import PatchGrid, Sizes, as_video
from .patchify import Layout
from .precision import accumulation_dtype
from .scatter_mask_tokens import scatter_mask_tokens
from .untouched import projects_patches

__all__ = ["MaskTokenScatter", "MaskedMSELoss", "MaskedPatchEmbed", "learned_token"]


def learned_token(dim: int) -> nn.Parameter:
    """A class or mask token as published: ``[1, 1, dim]`` from N(0, 0.02)."""
    return nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))


class _ReadsPixels(nn.Module):
    """Holds the patch size, and mean and standard deviation of pixels, by which uint8 and uint16 images are normalised.

    They lie beside the parameters, so that no call copies them to a GPU, and are not part of the state dict.
    """

    pixel_mean: Tensor | None
    pixel_std: Tensor | None

    def __init__(
        self,
        patch_size: Sizes,
        pixel_mean: Sequence[float] | Tensor | None,
        pixel_std: Sequence[float] | Tensor | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checks.sizes(op, "patch_size", patch_size, 2)
        self.patch_size: Sizes = patch_size if isinstance(patch_size, int) else tuple(patch_size)
        if (pixel_mean is None) != (pixel_std is None):
            given, missing = ("pixel_mean", "pixel_std") if pixel_std is None else ("pixel_std", "pixel_mean")
            raise ValueError(f"{op}: {given} was given without {missing}; pass both or neither")
        self._pixel_stats: tuple[list[float], list[float]] | None = None
        if pixel_mean is not None:
            mean, std = (
                torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten().tolist()
                for values in (pixel_mean, pixel_std)
            )
            if len(mean) != len(std):
                raise ValueError(f"{op}: pixel_mean has {len(mean)} values, but pixel_std has {len(std)}")
            if not all(value > 0 for value in std):
                raise ValueError(f"{op}: pixel_std must be positive, got {std}")
            self._pixel_stats = mean, std
        for name, values in zip(("pixel_mean", "pixel_std"), self._pixel_stats or (None, None), strict=True):
            buffer = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_ReadsPixels":
        before = self.pixel_mean, self.pixel_std
        super()._apply(fn, recurse)
        if self.pixel_mean is not None:
            self._write_statistics(self.pixel_mean, before)
        return self

    def _write_statistics(self, like: Tensor, before: Sequence[Tensor | None] = (None, None)) -> None:
        """Means and deviations anew, where ``like`` is: half() rounds such buffers, and to_empty() loses them.

        Of those ``before`` the values count that somebody has set in place of the given ones.
        """
        dtype = accumulation_dtype(like.dtype)
        self.pixel_mean, self.pixel_std = (
            torch.tensor(_own_values(old, values) or values, dtype=dtype, device=like.device)
            for old, values in zip(before, self._pixel_stats or (), strict=True)
        )

    def normalization(self, images: Tensor) -> dict[str, Tensor]:
        """Arguments ``mean`` and ``std`` of the ops for such images: floating ones are normalised already."""
        mean, std = (None, None) if images.is_floating_point() else (self.pixel_mean, self.pixel_std)
        if mean is None or std is None:
            return {}
        if mean.is_meta and not images.is_meta:  # load_state_dict(assign=True) fills only parameters
            self._write_statistics(torch.empty(0, device=images.device))
            return self.normalization(images)
        return {"mean": mean, "std": std}

    def floating_pixels(self, images: Tensor) -> Tensor:
        """Images as the ops read them: uint8 as ``x / 255``, normalised where there are mean and standard deviation."""
        x = images if images.is_floating_point() else images.to(torch.get_default_dtype())
        x = x / 255 if images.dtype == torch.uint8 else x
        if stats := self.normalization(images):
            mean, std = (values.view(-1, *[1] * (images.ndim - 2)) for values in stats.values())
            x = (x - mean) / std
        return x

    def extra_repr(self) -> str:
        text = f"patch_size={self.patch_size}"
        if self._pixel_stats is not None:
            mean, std = (tuple(values) for values in self._pixel_stats)
            text += f", pixel_mean={mean}, pixel_std={std}"
        return text


def _own_values(old: Tensor | None, values: Sequence[float]) -> list[float] | None:
    if type(old) is not Tensor or old.is_meta:
        return None
    same = torch.equal(old, torch.tensor(values, dtype=old.dtype, device=old.device))
    return None if same else old.tolist()


class MaskedPatchEmbed(_ReadsPixels):
    """Embed the visible patches of a batch of images: :func:`mae_kernels.patch_embed` and its projection.

    Args:
        patch_size: ``ph = pw``, ``(ph, pw)``, or ``(pt, ph, pw)`` for video and volumes, in pixels.
        in_chans: C.
        embed_dim: D.
        bias: whether the projection has one.
        pixel_mean: C values, by which uint8 images (as numbers in [0, 1]) and uint16 ones (in their own units) are
            normalised; floating ones are taken as they are. None reads uint8 as ``x / 255``, uint16 as it is.
        pixel_std: C values, likewise.
        out_dtype: dtype of the result; None promotes as the published code does.

    ``proj`` is a convolution with weight ``[D, C, (pt,) ph, pw]`` and bias ``[D]``. It is called itself, for all
    patches, only where somebody would notice: with hooks on it, an adapter, a parametrisation. Published initial
    values: xavier-uniform of the weight seen as a matrix ``[D, E]``.
    """

    patch_size: tuple[int, ...]
    embed_dim: int
    out_dtype: torch.dtype | None
    proj: nn.Conv2d | nn.Conv3d

    def __init__(
        self,
        patch_size: Sizes = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        bias: bool = True,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(patch_size, pixel_mean, pixel_std)
        if self._pixel_stats is not None and len(self._pixel_stats[0]) != in_chans:
            raise ValueError(
                f"MaskedPatchEmbed: pixel_mean has {len(self._pixel_stats[0])} values for {in_chans} channels"
            )
        self.embed_dim, self.out_dtype = embed_dim, out_dtype
        self.patch_size = checks.sizes("MaskedPatchEmbed", "patch_size", patch_size, 2)
        convolution: Callable[..., nn.Conv2d | nn.Conv3d] = nn.Conv3d if len(self.patch_size) == 3 else nn.Conv2d
        self.proj = convolution(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        """``[N, R + K, D]``; arguments as of the op, and a pos_embed of ``[R + L, D]`` has rows for the prefix too."""
        if prefix is not None and pos_embed is not None:
            prefix, pos_embed = self._split_positions(images, prefix, pos_embed)
        proj, out_dtype = self.proj, self.out_dtype
        if projects_patches(proj):
            return patch_embed(
                images, proj.weight, proj.bias, pos_embed, ids_keep, prefix=prefix, out_dtype=out_dtype,
                **self.normalization(images),
            )  # fmt: skip
        pixels = self.floating_pixels(images)
        if len(self.patch_size) == 3:
            pixels = as_video(pixels)
        elif pixels.ndim == 5:  # each frame is an image
            pixels = pixels.transpose(1, 2).flatten(0, 1)
        tokens = proj(pixels).flatten(2).transpose(1, 2).reshape(images.shape[0], -1, self.embed_dim)
        return _assemble(tokens, pos_embed, ids_keep, prefix, out_dtype)

    def _split_positions(self, images: Tensor, prefix: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        op, embed_dim = "MaskedPatchEmbed", self.embed_dim
        num_patches = PatchGrid.of(op, images, self.patch_size).num_patches
        prefix = checks.table(op, "prefix", prefix, "R", embed_dim)
        num_prefix = prefix.shape[0]
        pos_embed = checks.table(op, "pos_embed", pos_embed, "R + L", embed_dim)
        if pos_embed.shape[0] == num_patches:
            return prefix, pos_embed
        if pos_embed.shape[0] != num_prefix + num_patches:
            raise ValueError(
                f"{op}: pos_embed has {pos_embed.shape[0]} rows; it must have {num_patches}, one per patch, "
                f"or {num_prefix + num_patches} with those of the prefix"
            )
        return prefix + pos_embed[:num_prefix], pos_embed[num_prefix:]

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.out_dtype is None else f", out_dtype={self.out_dtype}")


def _assemble(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor | None, prefix: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    # What the op does behind the projection, for projections that have to be called, such as one with a LoRA adapter.
    x = tokens if pos_embed is None else tokens + pos_embed
    x = x if ids_keep is None else gather_tokens(x, ids_keep)
    if prefix is not None:
        x = torch.cat([prefix.reshape(1, -1, x.shape[2]).expand(x.shape[0], -1, -1), x], dim=1)
    return x if out_dtype is None else x.to(out_dtype)


class MaskTokenScatter(nn.Module):
    """Assemble the decoder's input from visible tokens: :func:`mae_kernels.scatter_mask_tokens`, with its arguments."""

    num_prefix: int
    out_dtype: torch.dtype | None

    def __init__(self, num_prefix: int = 1, *, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_prefix, self.out_dtype = num_prefix, out_dtype

    def forward(
        self, tokens: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None = None
    ) -> Tensor:
        """``[N, R + K, D] -> [N, R + L, D]``; arguments as of the op."""
        return scatter_mask_tokens(
            tokens, mask_token, ids_restore, pos_embed, num_prefix=self.num_prefix, out_dtype=self.out_dtype
        )

    def extra_repr(self) -> str:
        return f"num_prefix={self.num_prefix}" + ("" if self.out_dtype is None else f", out_dtype={self.out_dtype}")


class MaskedMSELoss(_ReadsPixels):
    """Mean squared error on the pixels of the masked patches: :func:`mae_kernels.masked_mse`, with its arguments.

    ``pixel_mean`` and ``pixel_std``: as of :class:`MaskedPatchEmbed`.
    """

    norm_pix: NormPix
    eps: float
    layout: Layout

    def __init__(
        self,
        patch_size: Sizes = 16,
        *,
        norm_pix: NormPix = True,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
        eps: float = 1e-6,
        layout: Layout = "channels_last",
    ) -> None:
        super().__init__(patch_size, pixel_mean, pixel_std)
        checks.layout("MaskedMSELoss", layout)
        checks.norm_pix("MaskedMSELoss", norm_pix)
        checks.eps("MaskedMSELoss", eps)
        self.norm_pix, self.eps, self.layout = norm_pix, eps, layout

    def forward(
        self, pred: Tensor, images: Tensor, *, mask: Tensor | None = None, ids_mask: Tensor | None = None
    ) -> Tensor:
        """Scalar float32 (float64 for a float64 pred); arguments as of the op."""
        return masked_mse(
            pred, images, patch_size=self.patch_size, mask=mask, ids_mask=ids_mask,
            norm_pix=self.norm_pix, eps=self.eps, layout=self.layout, **self.normalization(images),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm_pix={self.norm_pix}, eps={self.eps:g}, layout={self.layout!r}"
