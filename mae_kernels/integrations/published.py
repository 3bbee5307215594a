"""Models that follow the published class: recognised by their parts, whatever they are called and derive from."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..masked_mse import masked_mse
from ..patch_embed import patch_embed
from ..patchify import Layout
from ..scatter_mask_tokens import scatter_mask_tokens
from .pieces import (
    embeds,
    example_images,
    given,
    hides_some,
    keep_some,
    patch_numbers,
    restores,
    scores,
)
from .replacement import Replacement, reach

PARTS = (
    "patch_embed.proj", "pos_embed", "cls_token", "blocks", "norm", "decoder_embed", "mask_token", "decoder_pos_embed",
    "decoder_blocks", "decoder_norm", "decoder_pred",
)  # fmt: skip
METHODS = ("random_masking", "forward_encoder", "forward_decoder", "forward_loss")
LOOKED_FOR = f"a model with the published parts {', '.join(PARTS)} and the methods {', '.join(METHODS)}"


def missing(module: nn.Module) -> list[str]:
    lacking = [name for name in PARTS if reach(module, name) is None]
    return lacking + [name for name in METHODS if not hasattr(type(module), name)]


def replacements(module: Any) -> list[Replacement]:
    if missing(module):
        return []

    def num_patches() -> int:
        return module.pos_embed.shape[1] - 1

    def tokens(*shape: int) -> Tensor:
        like = module.mask_token
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    def masking_example() -> tuple[Any, ...]:
        return tokens(3, num_patches(), 5), 0.75

    def encoder_example() -> tuple[Any, ...]:
        return example_images(module.patch_embed.proj.weight, image_size(module)), 0.75

    def decoder_example() -> tuple[Any, ...]:
        x = tokens(2, 1 + int(num_patches() * 0.25), module.cls_token.shape[2])
        return x, torch.rand(2, num_patches(), device=x.device).argsort(1)

    def loss_example() -> tuple[Any, ...]:
        weight = module.patch_embed.proj.weight
        images = example_images(weight, image_size(module)).to(torch.promote_types(weight.dtype, torch.float32))
        pred = torch.randn(2, num_patches(), prod(weight.shape[1:]), dtype=images.dtype, device=images.device)
        return images, pred, module.random_masking(patch_numbers(2, num_patches(), images.device), 0.75)[1]

    proj, masking_ops = "patch_embed.proj", ("random_masking", "gather_tokens")
    return [
        Replacement("random_masking", _random_masking, masking_ops, masking_example, tensors=("pos_embed",)),
        Replacement(
            "forward_encoder", _forward_encoder, ("patch_embed",), encoder_example, projection=proj,
            passed_over=("patch_embed",), tensors=("cls_token", "pos_embed"), methods=("random_masking",),
        ),
        Replacement(
            "forward_decoder", _forward_decoder, ("scatter_mask_tokens",), decoder_example,
            tensors=("mask_token", "decoder_pos_embed"),
        ),
        *(
            Replacement("forward_loss", loss, ("masked_mse",), loss_example, projection=proj, methods=("patchify",))
            for loss in (_loss_channels_last, _loss_channels_first)
        ),
    ]  # fmt: skip


def image_size(module: Any) -> tuple[int, ...]:
    """(Frames,) height and width, as the patch embedding states them; else of as many patches along each side."""
    num_patches, patch = module.pos_embed.shape[1] - 1, module.patch_embed.proj.kernel_size
    side = round(num_patches ** (1 / len(patch)))
    stated = getattr(module.patch_embed, "img_size", None) or [side * p for p in patch]
    size = (stated, stated) if isinstance(stated, int) else tuple(stated)
    frames = prod(patch) * num_patches // prod(size)  # that a video model states elsewhere
    return size if len(size) == len(patch) else (frames, *size)


def _random_masking(self: Any, *args: Any, **kwargs: Any) -> Any:
    # [N, L, D] -> [N, K, D], [N, L] with 1 = removed, [N, L]
    call = given(args, kwargs, "x", "mask_ratio")
    if call is None or not hides_some(call[0].shape[1], call[1]):
        return NotImplemented
    return keep_some(*call)


def _forward_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, C, (T,) H, W] -> [N, 1 + K, D], [N, L], [N, L]
    call = given(args, kwargs, "x", "mask_ratio")
    if call is None or call[0].shape[2:] != image_size(self):
        return NotImplemented
    (x, mask_ratio), embed, num_patches = call, self.patch_embed, self.pos_embed.shape[1] - 1
    if not embeds(x, embed.proj.weight) or not hides_some(num_patches, mask_ratio):
        return NotImplemented
    kept, mask, ids_restore, *_ = self.random_masking(patch_numbers(x.shape[0], num_patches, x.device), mask_ratio)
    prefix = self.cls_token + self.pos_embed[:, :1, :]
    ids_keep = kept[:, :, 0].long()
    x = patch_embed(x, embed.proj.weight, embed.proj.bias, self.pos_embed[:, 1:, :], ids_keep, prefix=prefix)
    for block in self.blocks:
        x = block(x)
    return self.norm(x), mask, ids_restore


def _forward_decoder(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, 1 + K, D], [N, L] -> [N, L, E]
    call = given(args, kwargs, "x", "ids_restore")
    if call is None:
        return NotImplemented
    x, ids_restore = call
    if not restores(x, ids_restore):
        return NotImplemented
    x = self.decoder_embed(x)
    x = scatter_mask_tokens(x, self.mask_token, ids_restore, self.decoder_pos_embed)  # [N, 1 + L, D']
    for block in self.decoder_blocks:
        x = block(x)
    return self.decoder_pred(self.decoder_norm(x))[:, 1:, :]


def _loss_channels_last(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _loss(self, "channels_last", args, kwargs)


def _loss_channels_first(self: Any, *args: Any, **kwargs: Any) -> Any:  # SatMAE's
    return _loss(self, "channels_first", args, kwargs)


def _loss(self: Any, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # [N, C, (T,) H, W], [N, L, E], [N, L] -> scalar
    call = given(args, kwargs, "imgs", "pred", "mask")
    if call is None or not scores(*call):
        return NotImplemented
    images, pred, mask = call
    patch_size = self.patch_embed.proj.kernel_size
    norm_pix = bool(self.norm_pix_loss)
    loss = masked_mse(pred, images, patch_size=patch_size, mask=mask, norm_pix=norm_pix, layout=layout)
    return loss / mask.any()  # where nothing is hidden theirs is 0 / 0, by which people notice
