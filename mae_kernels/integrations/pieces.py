"""What the families share: which calls the ops cover, masking by any strategy, and input to try methods on."""

import torch
from torch import Tensor

from mae_kernels.gather_tokens import gather_tokens
from mae_kernels.masking import random_masking


def given(args: tuple, kwargs: dict, *names: str, **defaults) -> tuple | None:
    """The values of ``names``, then ``defaults``, when a call gives those and no others; None otherwise."""
    names = (*names, *defaults)
    values = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or values.keys() != set(names):
        return None
    return tuple(values[name] for name in names)


def hides_some(num_patches: int, mask_ratio: float) -> bool:
    """Whether some patches are hidden and some are not; without either the original code knows what to do."""
    return 0 < int(num_patches * (1 - mask_ratio)) < num_patches


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


def example_images(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """``[2, C, H, W]``: noise, nearly flat in some patches, where the variance counts for less than its epsilon."""
    images = torch.randn(2, weight.shape[1], *size, dtype=weight.dtype, device=weight.device)
    images[:, :, : size[0] // 2] *= 1e-3
    return images
