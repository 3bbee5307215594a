"""Where a model looks: attention of the class token."""

from typing import Any

import torch
from torch import Tensor

from mae.fields import check, is_whole
from mae.model import VisionTransformer


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Attention of the class token to each patch in one block, nothing masked.

    ``softmax(q k' / sqrt(d))`` of each head, q of the class token alone. What a head does not give to patches, the
    class token keeps for itself.

    Args:
        model: any encoder of ours, with or without a decoder or a classifier.
        images: ``[N, C, H, W]`` or ``[N, C, T, H, W]``, uint8 or normalised floating, on the model's device.
        block: its number, -1 for the last one.

    Returns:
        ``[N, heads, H', W']``, or ``[N, heads, T', H', W']`` of clips: float32, float64 for such a model.

    Raises:
        ValueError: there is no such block.
    """
    depth = len(model.blocks)
    expected = f"a whole number of {-depth} to {depth - 1}"
    check({"block": block}, {"block": (lambda x: is_whole(x, -depth, depth - 1), expected)})
    x = model.embed(images)
    for earlier in model.blocks[:block]:
        x = earlier(x)
    chosen: Any = model.blocks[block]
    norm, attn = chosen.norm1, chosen.attn
    queries, keys, _ = torch.unflatten(attn.qkv(norm(x)), 2, (3, attn.num_heads, -1)).unbind(2)  # [N, 1 + L, heads, d]
    scores = torch.einsum("nhd,nlhd->nhl", queries[:, 0], keys) * keys.shape[3] ** -0.5
    shares = scores.softmax(2, dtype=torch.promote_types(scores.dtype, torch.float32))  # [N, heads, 1 + L]
    return torch.unflatten(shares[:, :, 1:], 2, model.patch_grid(images).grid[-len(model.config.sides) :])
