"""Hugging Face's ViTMAE, of transformers 4 and 5."""

import sys
from math import prod

import torch
from torch import Tensor, nn

from mae_kernels.integrations.pieces import example_images, given, hides_some, keep_some, patch_numbers, untouched
from mae_kernels.integrations.replacement import Replacement
from mae_kernels.masked_mse import masked_mse
from mae_kernels.patch_embed import patch_embed
from mae_kernels.scatter_mask_tokens import scatter_mask_tokens

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


def _of_embeddings(module: nn.Module) -> list[Replacement]:
    embed = module.patch_embeddings
    weight = embed.projection.weight

    def masking_example():
        return (torch.randn(3, embed.num_patches, 5, dtype=weight.dtype, device=weight.device),)

    def example():
        return (example_images(weight, embed.image_size),)

    return [
        Replacement("random_masking", _random_masking, ("random_masking", "gather_tokens"), masking_example),
        Replacement("forward", _embed, ("patch_embed",), example),
    ]


def _of_decoder(module: nn.Module) -> list[Replacement]:
    table, width = module.decoder_pos_embed, module.decoder_embed.in_features
    num_patches = table.shape[1] - 1

    def example():
        visible = int(num_patches * 0.25)
        tokens = torch.randn(2, 1 + visible, width, dtype=table.dtype, device=table.device)
        return tokens, torch.rand(2, num_patches, device=table.device).argsort(1)

    return [Replacement("forward", _decode, ("scatter_mask_tokens",), example)]


def _of_model(module: nn.Module) -> list[Replacement]:
    embed = module.vit.embeddings.patch_embeddings
    weight = embed.projection.weight

    def loss_example():
        images = example_images(weight, embed.image_size).to(torch.promote_types(weight.dtype, torch.float32))
        pred = torch.randn(2, embed.num_patches, prod(weight.shape[1:]), dtype=images.dtype, device=images.device)
        _, mask, _ = module.vit.embeddings.random_masking(patch_numbers(2, embed.num_patches, images.device))
        return images, pred, mask

    def example():
        return (example_images(weight, embed.image_size),)

    if hasattr(module, "forward_loss"):  # not so in later versions of transformers 5
        return [Replacement("forward_loss", _forward_loss, ("masked_mse",), loss_example)]
    return [Replacement("forward", _forward, ("masked_mse",), example)]


def _random_masking(self, *args, **kwargs):  # [N, L, D] -> [N, K, D], [N, L] with 1 = removed, [N, L]
    call = given(args, kwargs, "sequence", noise=None)
    if call is None or not hides_some(call[0].shape[1], self.config.mask_ratio):
        return NotImplemented
    x, noise = call
    return keep_some(x, self.config.mask_ratio, noise)


def _embed(self, *args, **kwargs):  # [N, C, H, W] -> [N, 1 + K, D], [N, L], [N, L]
    call = given(args, kwargs, "pixel_values", noise=None, interpolate_pos_encoding=False)
    embed = self.patch_embeddings
    if call is None or call[2] or not _covers(self, call[0]):
        return NotImplemented
    images, noise, _ = call
    numbers = patch_numbers(len(images), embed.num_patches, images.device)
    kept, mask, ids_restore = self.random_masking(numbers, noise)
    table, proj = self.position_embeddings, embed.projection
    prefix = self.cls_token + table[:, :1]
    tokens = patch_embed(images, proj.weight, proj.bias, table[:, 1:], kept[:, :, 0].long(), prefix=prefix)
    return tokens, mask, ids_restore


def _covers(self, images: Tensor) -> bool:
    embed = self.patch_embeddings
    return (
        tuple(images.shape[1:]) == (embed.num_channels, *embed.image_size)
        and hides_some(embed.num_patches, self.config.mask_ratio)
        and type(embed.projection) is nn.Conv2d
        and untouched(embed, embed.projection)
    )


def _decode(self, *args, **kwargs):  # [N, 1 + K, D], [N, L] -> [N, L, E]
    call = given(args, kwargs, "hidden_states", "ids_restore", interpolate_pos_encoding=False)
    # Until transformers 4.52 the decoder itself, not its layers, did the checkpointing.
    checkpoints = self.gradient_checkpointing and not hasattr(self.decoder_layers[0], "gradient_checkpointing")
    if call is None or call[2] or checkpoints:
        return NotImplemented
    hidden, ids_restore, _ = call
    hidden = self.decoder_embed(hidden)
    hidden = scatter_mask_tokens(hidden, self.mask_token, ids_restore, self.decoder_pos_embed)  # [N, 1 + L, D']
    for layer in self.decoder_layers:
        hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = self.decoder_pred(self.decoder_norm(hidden))[:, 1:, :]
    return sys.modules[_MODULE].ViTMAEDecoderOutput(logits=logits)


def _forward_loss(self, *args, **kwargs):  # [N, C, H, W], [N, L, E], [N, L] -> scalar
    call = given(args, kwargs, "pixel_values", "pred", "mask", interpolate_pos_encoding=False)
    if call is None or call[3] or call[0].requires_grad:
        return NotImplemented
    return _loss(self.config, *call[:3])


def _forward(self, pixel_values=None, noise=None, interpolate_pos_encoding=None, *args, **kwargs):
    as_tuple = not kwargs.get("return_dict", self.config.return_dict)
    if args or pixel_values is None or pixel_values.requires_grad or interpolate_pos_encoding or as_tuple:
        return NotImplemented
    outputs = self.vit(pixel_values, noise=noise, **kwargs)
    decoded = self.decoder(outputs.last_hidden_state, outputs.ids_restore)
    return sys.modules[_MODULE].ViTMAEForPreTrainingOutput(
        loss=_loss(self.config, pixel_values, decoded.logits, outputs.mask),
        logits=decoded.logits,
        mask=outputs.mask,
        ids_restore=outputs.ids_restore,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _loss(config, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    return masked_mse(pred, images, patch_size=config.patch_size, mask=mask, norm_pix=config.norm_pix_loss)
