"""timm's VisionTransformer with patch dropout: an encoder that is trained on a part of the patches."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..masking import random_masking
from ..patch_embed import patch_embed
from .pieces import embeds, example_images, given, hides_some
from .replacement import Replacement

LOOKED_FOR = "VisionTransformer of timm with patch_drop_rate above 0"


def replacements(module: Any) -> list[Replacement]:
    theirs = sys.modules.get("timm.models.vision_transformer")
    if theirs is None or not isinstance(module, theirs.VisionTransformer) or isinstance(module.patch_drop, nn.Identity):
        return []

    def example() -> tuple[Any, ...]:
        return (example_images(module.patch_embed.proj.weight, module.patch_embed.img_size),)

    parts = {**PARTS, "passed_over": (*PARTS["passed_over"], "patch_drop")}
    ops = ("patch_embed", "random_masking")
    return [Replacement("forward_features", _forward_features, ops, example, **parts, options=why_not(module))]


def _forward_features(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, C, H, W] -> [N, R + K, D]
    call = given(args, kwargs, "x", attn_mask=None, is_causal=False)
    drop = self.patch_drop
    if call is None or call[1] is not None or call[2] or not self.training or self.grad_checkpointing:
        return NotImplemented
    images = call[0]
    if not covers(self, images) or not hides_some(self.patch_embed.num_patches, drop.prob):
        return NotImplemented
    shape = images.shape[0], self.patch_embed.num_patches
    noise = torch.randn(shape, device=images.device)
    ids_keep = random_masking(*shape, drop.prob, noise=noise).ids_keep
    x = embed_visible(self, images, ids_keep.sort(dim=1).values if drop.ordered else ids_keep)
    return self.norm(self.blocks(self.norm_pre(x)))


# What embed_visible uses of a VisionTransformer without calling it.
PARTS: dict[str, Any] = {
    "projection": "patch_embed.proj", "passed_over": ("patch_embed", "patch_embed.norm", "pos_drop"),
    "tensors": ("pos_embed",), "methods": ("_pos_embed",),
}  # fmt: skip


def why_not(vit: Any) -> str:
    """Which option of the model keeps :func:`embed_visible` from doing what vit does; empty if none does."""
    if vit.dynamic_img_size:
        return "dynamic_img_size takes images of any size"
    if not isinstance(vit.patch_embed.norm, nn.Identity):
        return f"patch_embed.norm is a {type(vit.patch_embed.norm).__name__}"
    return ""


def covers(vit: Any, images: Tensor) -> bool:
    """Whether :func:`embed_visible` does for these images what vit does: fixed size, no dropout of its own."""
    fits = embeds(images, vit.patch_embed.proj.weight) and tuple(images.shape[2:]) == vit.patch_embed.img_size
    return fits and not why_not(vit) and not (vit.training and vit.pos_drop.p)


def embed_visible(vit: Any, images: Tensor, ids_keep: Tensor) -> Tensor:
    """Prefix tokens and the patches ids_keep ``[N, K]``: ``[N, R + K, D]``."""
    proj, pos_embed = vit.patch_embed.proj, vit.pos_embed
    prefix = [x for x in (vit.cls_token, vit.reg_token) if x is not None]
    prefix = torch.cat(prefix, dim=1) if prefix else None  # [1, R, D]
    if not vit.no_embed_class and prefix is not None:
        prefix, pos_embed = prefix + pos_embed[:, : prefix.shape[1]], pos_embed[:, prefix.shape[1] :]
    return patch_embed(images, proj.weight, proj.bias, pos_embed, ids_keep, prefix=prefix)
