"""Images as patches and back; and the rows of pixels that belong to chosen patches."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mae_kernels import checks
from mae_kernels.precision import accumulation_dtype

Layout = Literal["channels_last", "channels_first"]

_PATCHES = {
    "channels_last": "n c (h p) (w q) -> n (h w) (p q c)",
    "channels_first": "n c (h p) (w q) -> n (h w) (c p q)",
}
_IMAGES = {
    "channels_last": "n (h w) (p q c) -> n c (h p) (w q)",
    "channels_first": "n (h w) (c p q) -> n c (h p) (w q)",
}


def patchify(images: Tensor, patch_size: int | tuple[int, int], layout: Layout = "channels_last") -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: ``[N, C, H, W]``, any dtype that the ops take.
        patch_size: ``ph = pw``, or ``(ph, pw)``, in pixels.
        layout: order of the E values of a patch: ``"channels_last"`` (row, column, channel: published) or ``"channels_first"``.

    Returns:
        ``[N, L, E]`` with ``L = (H // ph) * (W // pw)`` and ``E = C * ph * pw``, in the dtype of images.

    Raises:
        ValueError: sizes that are not multiples of the patch; unknown layout.

    Equivalent PyTorch: ``einops.rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=ph, q=pw)``.
    """
    op = "patchify"
    ph, pw = checks.patch_size(op, patch_size)
    checks.images(op, images, (ph, pw))
    checks.layout(op, layout)
    return rearrange(images, _PATCHES[layout], p=ph, q=pw)


def unpatchify(
    patches: Tensor,
    patch_size: int | tuple[int, int],
    image_size: int | tuple[int, int],
    layout: Layout = "channels_last",
) -> Tensor:
    """Put patches together again: the inverse of :func:`patchify`.

    Args:
        patches: ``[N, L, E]``.
        patch_size: ``ph = pw``, or ``(ph, pw)``, in pixels.
        image_size: ``H = W``, or ``(H, W)``, in pixels.
        layout: order of the E values of a patch, see :func:`patchify`.

    Returns:
        ``[N, C, H, W]`` with ``C = E // (ph * pw)``, in the dtype of patches.

    Raises:
        ValueError: sizes that do not fit each other; unknown layout.

    Equivalent PyTorch: ``einops.rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=H // ph, p=ph, q=pw)``.
    """
    op = "unpatchify"
    ph, pw = checks.patch_size(op, patch_size)
    checks.tensor(op, "patches", patches, ("N", "L", "E"))
    checks.layout(op, layout)
    height, width = checks.pair(op, "image_size", image_size)
    if height % ph or width % pw or patches.shape[1] != (height // ph) * (width // pw):
        raise ValueError(
            f"{op}: patches has {patches.shape[1]} patches per sample, "
            f"but a {height}x{width} image has {height / ph:g} x {width / pw:g} patches of {ph}x{pw}"
        )
    if patches.shape[2] % (ph * pw):
        raise ValueError(f"{op}: patches has {patches.shape[2]} values per patch, not a multiple of {ph}x{pw}")
    return rearrange(patches, _IMAGES[layout], h=height // ph, p=ph, q=pw)


def patch_grid(images: Tensor, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Patches along each side of ``[N, C, H, W]``; L is their product."""
    return tuple(size // p for size, p in zip(images.shape[2:], patch_size, strict=True))


def gather_patches(images: Tensor, flat_ids: Tensor | None, patch_size: list[int], layout: Layout) -> Tensor:
    """The patches at ``flat_ids = n * L + l`` (all of them for None) as ``[len(flat_ids), E]``, in the images' dtype.

    A patch is read as whole rows of pixels: the index has one entry per row of a patch, and each row is one copy.
    """
    ph, pw = patch_size
    n, c, height, _ = images.shape
    gh, gw = patch_grid(images, patch_size)
    if flat_ids is None:
        return rearrange(images, _PATCHES[layout], p=ph, q=pw).reshape(n * gh * gw, c * ph * pw)

    channels_last = images.stride(1) == 1 and c > 1 and images.is_contiguous(memory_format=torch.channels_last)
    if channels_last:
        stored = "channels_last"
        pixels = images.permute(0, 2, 3, 1).view(n * height * gw, pw * c)
        rows = torch.arange(height * gw, device=images.device).view(gh, ph, gw)
        rows = rearrange(rows, "gh p gw -> (gh gw) p")  # [L, ph]
    else:
        stored = "channels_first"
        pixels = images.contiguous().view(n * c * height * gw, pw)
        rows = torch.arange(c * height * gw, device=images.device).view(c, gh, ph, gw)
        rows = rearrange(rows, "c gh p gw -> (gh gw) (c p)")  # [L, C * ph]
    sample, patch = flat_ids // (gh * gw), flat_ids % (gh * gw)
    index = rows[patch] + (sample * rows.numel())[:, None]  # [len(flat_ids), rows of a patch]
    patches = pixels.index_select(0, index.flatten())
    if stored == layout or c == 1:
        return patches.view(-1, c * ph * pw)
    a, b = (ph * pw, c) if stored == "channels_last" else (c, ph * pw)
    return patches.view(-1, a, b).transpose(1, 2).reshape(-1, c * ph * pw)


def normalize_pixels(
    patches: Tensor, channels: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype, layout: Layout
) -> Tensor:
    """``(x - mean[c]) / std[c]`` of patches ``[B, E]``, uint8 read as ``x / 255``, in ``dtype``.

    Computed in float32, or float64 for a float64 result, whatever the dtypes are.
    """
    if mean is None and patches.dtype != torch.uint8:
        return patches.to(dtype)
    work = accumulation_dtype(dtype)
    patches = patches.to(work).div_(255) if patches.dtype == torch.uint8 else patches.to(work)
    if mean is not None:
        mean, std = mean.to(work), std.to(work)
        if layout == "channels_last":
            by_channel = patches.unflatten(1, (-1, channels))  # [B, ph pw, C]
        else:
            by_channel = patches.unflatten(1, (channels, -1))  # [B, C, ph pw]
            mean, std = mean[:, None], std[:, None]
        patches = (by_channel - mean).div_(std).view_as(patches)
    return patches.to(dtype)
