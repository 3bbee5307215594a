"""Fused ops for masked-autoencoder training: drop-in for the published pipeline, on any device PyTorch has."""

from mae_kernels import decompositions, reference
from mae_kernels import nn as nn  # not in __all__, where it would shadow torch's nn in a star import
from mae_kernels.backend import use_backend, why_not_triton
from mae_kernels.gather_tokens import gather_tokens
from mae_kernels.integrations import apply, unapply
from mae_kernels.linear_masked_mse import linear_masked_mse
from mae_kernels.masked_mse import masked_mse
from mae_kernels.masking import (
    Masking,
    axis_masking,
    block_masking,
    grid_masking,
    masking_from_mask,
    random_masking,
    tube_masking,
)
from mae_kernels.patch_embed import patch_embed
from mae_kernels.patchify import patchify, unpatchify
from mae_kernels.random_resized_crop import PackedImages, random_crop_boxes, random_resized_crop
from mae_kernels.scatter_mask_tokens import scatter_mask_tokens

__version__ = "0.1.0"

__all__ = [
    "Masking",
    "PackedImages",
    "apply",
    "axis_masking",
    "block_masking",
    "decompositions",
    "gather_tokens",
    "grid_masking",
    "linear_masked_mse",
    "masked_mse",
    "masking_from_mask",
    "patch_embed",
    "patchify",
    "random_crop_boxes",
    "random_masking",
    "random_resized_crop",
    "reference",
    "scatter_mask_tokens",
    "tube_masking",
    "unapply",
    "unpatchify",
    "use_backend",
    "why_not_triton",
]
