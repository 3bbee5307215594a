"""lightly's MaskedVisionTransformerTIMM: the encoder of its masked autoencoders, around one of timm's."""

import sys
from typing import Any

import torch

from .pieces import example_images, given
from .replacement import Replacement
from .timm import PARTS, covers, embed_visible, why_not

LOOKED_FOR = "MaskedVisionTransformerTIMM of lightly"


def replacements(module: Any) -> list[Replacement]:
    theirs = sys.modules.get("lightly.models.modules.masked_vision_transformer_timm")
    if theirs is None or not isinstance(module, theirs.MaskedVisionTransformerTIMM):
        return []

    def example() -> tuple[Any, ...]:
        embed = module.vit.patch_embed
        images = example_images(embed.proj.weight, embed.img_size)
        shuffled = torch.rand(2, embed.num_patches, device=images.device).argsort(1)
        idx_keep = torch.cat([shuffled.new_zeros(2, 1), 1 + shuffled[:, : embed.num_patches // 4]], dim=1)
        return images, None, idx_keep

    parts: dict[str, Any] = {
        name: tuple(f"vit.{path}" for path in PARTS[name]) for name in ("passed_over", "tensors", "methods")
    }
    parts["methods"] += ("images_to_tokens", "prepend_prefix_tokens", "add_pos_embed")
    parts["projection"] = f"vit.{PARTS['projection']}"
    return [Replacement("preprocess", _preprocess, ("patch_embed",), example, **parts, options=why_not(module.vit))]


def _preprocess(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, C, H, W], [N, 1 + K] -> [N, 1 + K, D]
    call = given(args, kwargs, "images", idx_mask=None, idx_keep=None, mask=None)
    if call is None or call[1] is not None or call[2] is None or call[3] is not None:
        return NotImplemented
    images, idx_keep = call[0], call[2]
    if self.vit.num_prefix_tokens != 1 or idx_keep.shape[1] < 2 or not covers(self.vit, images):
        return NotImplemented
    # Theirs counts the class token as number 0. random_token_mask keeps it, first; another order is not covered,
    # and must not pass for it: no host reads the GPU here, so a wrong one ends as an error, not as a wrong result.
    torch._assert_async((idx_keep[:, 0] == 0).all(), "apply: the class token, number 0, must come first in idx_keep")
    return embed_visible(self.vit, images, idx_keep[:, 1:] - 1)
