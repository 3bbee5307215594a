"""Hugging Face's ViTMAE, of transformers 4 and 5."""

import sys
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..masked_mse import masked_mse
from ..patch_embed import patch_embed
from ..scatter_mask_tokens import scatter_mask_tokens
from .pieces import (
    embeds,
    example_images,
    given,
    hides_some,
    keep_some,
    orders,
    patch_numbers,
    restores,
    scores,
)
from .replacement import Replacement

_MODULE = "transformers.models.vit_mae.modeling_vit_mae"
LOOKED_FOR = "ViTMAEForPreTraining or ViTMAEModel of transformers"


def replacements(module: nn.Module) -> list[Replacement]:
    theirs = sys.modules.get(_MODULE)
    if theirs is None:
        return []
    if isinstance(module, theirs.ViTMAEEmbeddings):
        return _of_embeddings(module)
    if isinstance(module, theirs.ViTMAEDecoder):
        return _of_decoder(module)
    if isinstance(module, theirs.ViTMAEForPreTraining):
        return _of_model(module)
    return []


class _Shape(NamedTuple):
    """Of a model's images and patches, in pixels."""

    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int

    @classmethod
    def of(cls, config: Any) -> "_Shape":
        image, patch = (
            (size, size) if isinstance(size, int) else tuple(size) for size in (config.image_size, config.patch_size)
        )
        return cls(image, patch, config.num_channels)

    @property
    def num_patches(self) -> int:
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    def images(self, like: Tensor) -> Tensor:
        return example_images(like.new_empty(1, self.channels, *self.patch), self.image)


def _options(config: Any) -> str:
    return "" if _is_hiding(config) else f"a mask ratio of {config.mask_ratio} hides none of the patches, or all"


def _of_embeddings(module: Any) -> list[Replacement]:
    shape, options = _Shape.of(module.config), _options(module.config)

    def masking_example() -> tuple[Tensor, ...]:
        like = module.cls_token
        return (torch.randn(3, shape.num_patches, 5, dtype=like.dtype, device=like.device),)

    masking_ops = ("random_masking", "gather_tokens")
    return [
        Replacement("random_masking", _random_masking, masking_ops, masking_example, options=options),
        Replacement(
            "forward", _embed, ("patch_embed",), lambda: (shape.images(module.cls_token),),
            projection="patch_embeddings.projection", passed_over=("patch_embeddings",),
            tensors=("cls_token", "position_embeddings"), methods=("random_masking",), options=options,
        ),
    ]  # fmt: skip


def _of_decoder(module: Any) -> list[Replacement]:
    def example() -> tuple[Tensor, ...]:
        table, num_patches = module.decoder_pos_embed, module.decoder_pos_embed.shape[1] - 1
        like = {"dtype": table.dtype, "device": table.device}
        tokens = torch.randn(2, 1 + int(num_patches * 0.25), module.decoder_embed.in_features, **like)
        return tokens, torch.rand(2, num_patches, device=table.device).argsort(1)

    tensors = ("mask_token", "decoder_pos_embed")
    return [Replacement("forward", _decode, ("scatter_mask_tokens",), example, tensors=tensors)]


def _of_model(module: Any) -> list[Replacement]:
    shape = _Shape.of(module.config)

    def loss_example() -> tuple[Tensor, ...]:
        like = module.vit.embeddings.cls_token
        images = shape.images(like).to(torch.promote_types(like.dtype, torch.float32))
        values = shape.channels * prod(shape.patch)
        pred = torch.randn(2, shape.num_patches, values, dtype=images.dtype, device=images.device)
        _, mask, _ = module.vit.embeddings.random_masking(patch_numbers(2, shape.num_patches, images.device))
        return images, pred, mask

    if hasattr(module, "forward_loss"):  # not so in later versions of transformers 5
        method, function, example = "forward_loss", _forward_loss, loss_example
    else:
        method, function, example = "forward", _forward, lambda: (shape.images(module.vit.embeddings.cls_token),)
    options = _options(module.config)
    return [Replacement(method, function, ("masked_mse",), example, methods=("patchify",), options=options)]


def _random_masking(self: Any, *args: Any, **kwargs: Any) -> Any:
    # [N, L, D] -> [N, K, D], [N, L] with 1 = removed, [N, L]
    call = given(args, kwargs, "sequence", noise=None)
    if call is None or not hides_some(call[0].shape[1], self.config.mask_ratio):
        return NotImplemented
    x, noise = call
    if not orders(noise, *x.shape[:2]):
        return NotImplemented
    return keep_some(x, self.config.mask_ratio, noise)


def _embed(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, C, H, W] -> [N, 1 + K, D], [N, L], [N, L]
    call = given(args, kwargs, "pixel_values", noise=None, interpolate_pos_encoding=False)
    embed = self.patch_embeddings
    if call is None or call[2]:
        return NotImplemented
    (images, noise, _), shape = call, _Shape.of(self.config)
    covered = embeds(images, embed.projection.weight) and images.shape[2:] == shape.image
    if not covered or not hides_some(shape.num_patches, self.config.mask_ratio):
        return NotImplemented
    if not orders(noise, images.shape[0], shape.num_patches):
        return NotImplemented
    numbers = patch_numbers(images.shape[0], shape.num_patches, images.device)
    kept, mask, ids_restore = self.random_masking(numbers, noise)
    table, proj = self.position_embeddings, embed.projection
    prefix = self.cls_token + table[:, :1]
    tokens = patch_embed(images, proj.weight, proj.bias, table[:, 1:], kept[:, :, 0].long(), prefix=prefix)
    return tokens, mask, ids_restore


def _decode(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, 1 + K, D], [N, L] -> [N, L, E]
    call = given(args, kwargs, "hidden_states", "ids_restore", interpolate_pos_encoding=False)
    # Until transformers 4.52 the decoder itself, not its layers, did the checkpointing.
    checkpoints = self.gradient_checkpointing and not hasattr(self.decoder_layers[0], "gradient_checkpointing")
    if call is None or call[2] or checkpoints:
        return NotImplemented
    hidden, ids_restore, _ = call
    if not restores(hidden, ids_restore):
        return NotImplemented
    hidden = self.decoder_embed(hidden)
    hidden = scatter_mask_tokens(hidden, self.mask_token, ids_restore, self.decoder_pos_embed)  # [N, 1 + L, D']
    for layer in self.decoder_layers:
        hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = self.decoder_pred(self.decoder_norm(hidden))[:, 1:, :]
    return sys.modules[_MODULE].ViTMAEDecoderOutput(logits=logits)


def _forward_loss(self: Any, *args: Any, **kwargs: Any) -> Any:  # [N, C, H, W], [N, L, E], [N, L] -> scalar
    call = given(args, kwargs, "pixel_values", "pred", "mask", interpolate_pos_encoding=False)
    if call is None or call[3] or not _is_hiding(self.config) or not scores(*call[:3]):
        return NotImplemented
    return _loss(masked_mse, self.config, *call[:3])


def _forward(
    self: Any,
    pixel_values: Tensor | None = None,
    noise: Tensor | None = None,
    interpolate_pos_encoding: bool | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    as_tuple = not kwargs.get("return_dict", self.config.return_dict)
    if args or pixel_values is None or pixel_values.requires_grad or interpolate_pos_encoding or as_tuple:
        return NotImplemented
    if not pixel_values.is_floating_point() or not _is_hiding(self.config):
        return NotImplemented
    outputs = self.vit(pixel_values, noise=noise, **kwargs)
    decoded = self.decoder(outputs.last_hidden_state, outputs.ids_restore)
    inputs = pixel_values, decoded.logits, outputs.mask
    loss = masked_mse if scores(*inputs) else reference.masked_mse
    return sys.modules[_MODULE].ViTMAEForPreTrainingOutput(
        loss=_loss(loss, self.config, *inputs),
        logits=decoded.logits,
        mask=outputs.mask,
        ids_restore=outputs.ids_restore,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _is_hiding(config: Any) -> bool:
    return hides_some(_Shape.of(config).num_patches, config.mask_ratio)


def _loss(loss: Callable[..., Tensor], config: Any, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    return loss(pred, images, patch_size=config.patch_size, mask=mask, norm_pix=config.norm_pix_loss)
