"""What mask tokens in the encoder cost: table 2 of He et al. 2021, forward and backward, as ratios on this machine."""

import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from mae.model import MAEConfig, MaskedAutoencoder
from mae.training.profile import training_flops
from mae_kernels import Masking, random_masking

ROUNDS = 3


class WithMaskTokens(nn.Module):
    """An autoencoder whose encoder sees all patches, mask tokens in the place of the hidden ones, as BEiT's."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model
        self.token = nn.Parameter(torch.zeros(1, 1, model.config.embed_dim))

    def forward(self, images: Tensor, masking: Masking) -> Tensor:
        model = self.model
        hidden = nn.functional.pad(masking.mask, (1, 0))[..., None]  # the class token is never one
        tokens = torch.where(hidden, self.token + model.pos_embed, model.embed(images))
        x = model.decoder_embed(model.encode(tokens)) + model.decoder_pos_embed
        return model.loss(model.decode(x, masking.ids_mask), images, masking.ids_mask)


def compare(model: MaskedAutoencoder, batch_size: int) -> dict[str, float]:
    """Milliseconds an image with mask tokens and 8 decoder blocks, and how many times that is those of 8 and 1 without.

    Medians of interleaved rounds, without the optimizer, which an image of a batch of 4096 would not notice.
    """
    images = torch.randint(0, 256, (batch_size, model.config.in_chans, *model.config.image_size), dtype=torch.uint8)
    masking = random_masking(batch_size, model.config.num_patches)
    other, blocks = WithMaskTokens(model), model.decoder_blocks
    times: dict[int | None, list[float]] = {None: [], 8: [], 1: []}
    for _ in range(ROUNDS):
        for depth, took in times.items():
            model.decoder_blocks = blocks[:depth]
            start = time.perf_counter()
            loss = other(images, masking) if depth is None else model(images, masking=masking).loss
            loss.backward()
            took.append(time.perf_counter() - start)
            other.zero_grad()
    model.decoder_blocks = blocks
    with_tokens, flops = median(times.pop(None)), flops_with_mask_tokens(model.config)
    values = {"ms": 1e3 * with_tokens / batch_size}
    for depth, took in times.items():
        values[f"ratio, {depth}"] = with_tokens / median(took)
        values[f"FLOPs, {depth}"] = flops / training_flops(replace(model.config, decoder_depth=depth))
    return values


def flops_with_mask_tokens(config: MAEConfig) -> float:
    """Of an image: all patches in the encoder, and the decoder as it is without."""
    without_blocks = replace(config, depth=0)
    encoder = training_flops(config, mask_ratio=0) - training_flops(without_blocks, mask_ratio=0)
    return encoder + training_flops(without_blocks)
