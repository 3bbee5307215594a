"""Fused ops for masked-autoencoder training: drop-in for the published pipeline, on any device PyTorch has."""

from . import decompositions, reference
from . import nn as nn  # not in __all__, where it would shadow torch's nn in a star import
from .backend import use_backend, why_not_triton
from .gather_tokens import gather_tokens
from .integrations import apply, unapply
from .linear_masked_mse import linear_masked_mse
from .masked_mse import masked_mse
from .masking import (
    Masking,
    axis_masking,
    block_masking,
    grid_masking,
    masking_from_mask,
    random_masking,
    tube_masking,
)
from .patch_embed import patch_embed
from .patchify import patchify, unpatchify
from .random_resized_crop import PackedImages, random_crop_boxes, random_resized_crop
from .scatter_mask_tokens import scatter_mask_tokens

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
