"""Images as patches and back; and the rows of pixels that belong to chosen patches."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from . import checks
from .patch_grid import PatchGrid, Sizes, as_video
from .precision import accumulation_dtype

Layout = Literal["channels_last", "channels_first"]

_ROWS = {"channels_last": "(r p q c)", "channels_first": "(c r p q)"}


def patchify(images: Tensor, patch_size: Sizes, layout: Layout = "channels_last") -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: ``[N, C, H, W]`` or ``[N, C, T, H, W]``, any dtype that the ops take.
        patch_size: an int for all sides, ``(ph, pw)`` or ``(pt, ph, pw)``, in pixels.
        layout: order of the E values of a patch: ``"channels_last"`` (frame, row, column, channel: published) or
            ``"channels_first"``.

    Returns:
        ``[N, L, E]`` with ``L = (T / pt) * (H / ph) * (W / pw)`` and ``E = C * pt * ph * pw``, in the dtype of images.

    Raises:
        ValueError: sizes that are not multiples of the patch; unknown layout.

    Equivalent PyTorch: ``einops.rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=ph, q=pw)``.
    """
    op = "patchify"
    grid = PatchGrid.of(op, images, patch_size)
    checks.layout(op, layout)
    return _cut(as_video(images), grid, layout)


def unpatchify(patches: Tensor, patch_size: Sizes, image_size: Sizes, layout: Layout = "channels_last") -> Tensor:
    """Put patches together again: the inverse of :func:`patchify`.

    Args:
        patches: ``[N, L, E]``.
        patch_size: as of :func:`patchify`.
        image_size: ``H = W``, ``(H, W)`` or ``(T, H, W)``, in pixels.
        layout: as of :func:`patchify`.

    Returns:
        ``[N, C, H, W]``, or ``[N, C, T, H, W]`` for three sizes, in the dtype of patches.

    Raises:
        ValueError: sizes that do not fit each other; unknown layout.

    Equivalent PyTorch: ``einops.rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=H // ph, p=ph, q=pw)``.
    """
    op = "unpatchify"
    checks.tensor(op, "patches", patches, ("N", "L", "E"))
    checks.layout(op, layout)
    sides = len(checks.sizes(op, "image_size", image_size, 2))
    patch, grid, _ = PatchGrid.of_sizes(op, image_size, patch_size, 1)
    per_channel = patch[0] * patch[1] * patch[2]
    if patches.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(
            f"{op}: patches has {patches.shape[1]} patches per sample, but images of size {image_size} have "
            f"{' x '.join(map(str, grid[-sides:]))} patches of size {patch_size}"
        )
    if patches.shape[2] % per_channel:
        raise ValueError(
            f"{op}: patches has {patches.shape[2]} values per patch, not a multiple of the {per_channel} pixels of one"
        )
    names = dict(zip("thrpq", (*grid[:2], *patch), strict=True))
    images = rearrange(patches, f"n (t h w) {_ROWS[layout]} -> n c (t r) (h p) (w q)", **names)
    return images if sides == 3 else images[:, :, 0]


def _cut(images: Tensor, grid: PatchGrid, layout: Layout) -> Tensor:
    names = dict(zip("rpq", grid.patch, strict=True))
    return rearrange(images, f"n c (t r) (h p) (w q) -> n (t h w) {_ROWS[layout]}", **names)


def gather_patches(images: Tensor, flat_ids: Tensor | None, grid: PatchGrid, layout: Layout) -> Tensor:
    """The patches at ``flat_ids = n * L + l`` (all of them for None) as ``[len(flat_ids), E]``, in the images' dtype.

    A patch is read as whole rows of pixels: the index has one entry per row of a patch, and each row is one copy.
    Images are ``[N, C, T, H, W]``.
    """
    if images.dtype == torch.uint16:  # PyTorch selects no rows of it
        return gather_patches(images.view(torch.int16), flat_ids, grid, layout).view(torch.uint16)
    if flat_ids is None:
        return _cut(images, grid, layout).reshape(-1, grid.patch_values)
    (_, c, frames, height, _), (pt, ph, pw), (gt, gh, gw) = images.shape, grid.patch, grid.grid
    if images.stride(1) == 1 and c > 1:
        stored, planes, pixels = "channels_last", 1, images.permute(0, 2, 3, 4, 1).contiguous().view(-1, pw * c)
    else:
        stored, planes, pixels = "channels_first", c, images.contiguous().view(-1, pw)
    lines = torch.arange(planes * frames * height * gw, device=images.device).view(planes, gt, pt, gh, ph, gw)
    lines = lines.permute(1, 3, 5, 0, 2, 4).reshape(grid.num_patches, -1)  # [L, rows of a patch]
    sample, patch = flat_ids // grid.num_patches, flat_ids % grid.num_patches
    index = lines[patch] + (sample * lines.numel())[:, None]
    patches = pixels.index_select(0, index.flatten())
    if stored == layout or c == 1:
        return patches.view(-1, grid.patch_values)
    a, b = (pt * ph * pw, c) if stored == "channels_last" else (c, pt * ph * pw)
    return patches.view(-1, a, b).transpose(1, 2).reshape(-1, grid.patch_values)


def normalize_pixels(
    patches: Tensor, statistics: Tensor | None, dtype: torch.dtype, layout: Layout = "channels_first"
) -> Tensor:
    """``(x - mean[c]) / std[c]`` of patches ``[B, E]``, uint8 read as ``x / 255``, in ``dtype``.

    ``statistics [2, C]`` holds mean and std. Computed in float32, or float64 for a float64 result.
    """
    if statistics is None and patches.is_floating_point():
        return patches.to(dtype)
    work = accumulation_dtype(dtype)
    patches = patches.to(work).div_(255) if patches.dtype == torch.uint8 else patches.to(work)
    if statistics is not None:
        mean, std = statistics.to(work)
        if layout == "channels_last":
            by_channel = patches.unflatten(1, (-1, len(mean)))  # [B, pt ph pw, C]
        else:
            by_channel = patches.unflatten(1, (len(mean), -1))  # [B, C, pt ph pw]
            mean, std = mean[:, None], std[:, None]
        patches = (by_channel - mean).div_(std).view_as(patches)
    return patches.to(dtype)
