"""What the families share: which calls the ops cover, masking by any strategy, and input to try methods on."""

from typing import Any

import torch
from torch import Tensor

from ..gather_tokens import gather_tokens
from ..masking import random_masking
from ..precision import accumulation_dtype
from ..registration import in_onnx_export


def given(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str, **defaults: Any) -> tuple[Any, ...] | None:
    """The values of ``names``, then ``defaults``, when a call gives those and no others; None otherwise."""
    names = (*names, *defaults)
    values = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or values.keys() != set(names):
        return None
    return tuple(values[name] for name in names)


def hides_some(num_patches: int, mask_ratio: float) -> bool:
    """Whether some patches are hidden and some are not; else the original code knows what to do, or to say."""
    return isinstance(mask_ratio, (int, float)) and 0 < int(num_patches * (1 - mask_ratio)) < num_patches


def embeds(images: Tensor, weight: Tensor) -> bool:
    """Whether the convolution of that weight takes the images too: floating, in its dtype, with its channels."""
    same = images.dtype == weight.dtype or torch.is_autocast_enabled(images.device.type)
    return images.is_floating_point() and same and images.ndim == weight.ndim and images.shape[1] == weight.shape[1]


def orders(noise: Tensor | None, n: int, num_patches: int) -> bool:
    """Whether there is no noise, or a number for each patch."""
    return noise is None or (noise.is_floating_point() and noise.shape == (n, num_patches))


def restores(tokens: Tensor, ids_restore: Tensor) -> bool:
    """Whether ``[N, 1 + K, D]`` and ``[N, L]`` are visible patches and an order of all, some of them hidden."""
    return ids_restore.dtype == torch.int64 and 0 < tokens.shape[1] - 1 < ids_restore.shape[1]


def scores(images: Tensor, pred: Tensor, mask: Tensor) -> bool:
    """Whether the loss of images, predictions and mask is that of the op: nothing but pred has a gradient, the mask is
    0 or 1, and the original sums in the same dtype."""
    if images.requires_grad or mask.requires_grad or not images.is_floating_point():
        return False
    widest = torch.promote_types(torch.promote_types(pred.dtype, images.dtype), mask.dtype)
    if widest != accumulation_dtype(pred.dtype) or not (mask.is_floating_point() or mask.dtype == torch.bool):
        return False
    if in_onnx_export():
        return True
    is_binary = ((mask == 0) | (mask == 1)).all()
    if mask.is_cuda or torch.compiler.is_compiling():
        # No host reads a GPU here: another mask ends as an error there, not as a wrong loss.
        torch._assert_async(is_binary, "apply: a mask must be 0 or 1")
        return True
    return bool(is_binary)


def patch_numbers(batch_size: int, num_patches: int, device: torch.device) -> Tensor:
    """``[N, L, 1]``: each patch's own number, exact up to 2^24, in place of its embedding.

    What a masking method keeps of them are the ids that it keeps, whatever its strategy.
    """
    return torch.arange(num_patches, dtype=torch.float32, device=device)[:, None].expand(batch_size, -1, -1)


def keep_some(x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Published random masking, ``[N, L, D]``: visible ``[N, K, D]``, mask ``[N, L]`` with 1 = removed, ids_restore."""
    n, num_patches, _ = x.shape
    noise = torch.rand(n, num_patches, device=x.device) if noise is None else noise.to(x.device)
    masking = random_masking(n, num_patches, mask_ratio, noise=noise)
    return gather_tokens(x, masking.ids_keep), masking.mask.to(torch.get_default_dtype()), masking.ids_restore


def example_images(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[2, C, (T,) H, W]``: noise, in the second sample so faint that its variance counts for less than epsilon."""
    images = torch.randn(2, weight.shape[1], *size, dtype=weight.dtype, device=weight.device)
    images[1] *= 1e-3
    return images
