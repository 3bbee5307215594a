"""The definition of every op: the masked autoencoder of He et al. 2021, step by step, in plain PyTorch.

Source: "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377, section 3.
Same signatures as the ops, any floating dtype, any device. Each step is written out as published, wasteful as it is
(every patch is embedded, every index is materialised, the loss covers the visible patches too and is then masked):
the tests hold the ops against this file in float64, and the benchmarks measure what the ops save.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .checks import Values
from .masked_mse import NormPix
from .masking import Masking
from .patch_grid import Sizes
from .patchify import Layout

# A patch has r frames, p rows and q columns; an image is a video of one frame.
_VALUES = {"channels_last": "(r p q c)", "channels_first": "(c r p q)"}


def random_masking(
    batch_size: int,
    num_patches: int,
    mask_ratio: float = 0.75,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Section 3, "Masking": shuffle the patches by noise [N, L], keep the first ones, remember the way back."""
    if noise is None:
        noise = torch.rand(batch_size, num_patches, generator=generator, device=device, dtype=torch.float32)
    num_keep = int(num_patches * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :num_keep] = 0
    mask = torch.gather(mask, 1, ids_restore)
    return Masking(ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:], ids_restore, mask.bool())


def random_resized_crop(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor,
    flips: Tensor,
    size: int | tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    rounded: bool = True,
) -> Tensor:
    """Appendix A.1, "random resized cropping", image by image: cut the box out, resize it, flip it."""
    crops: list[Tensor] = []
    for image, (top, left, height, width), flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        crop = image[None, :, top : top + height, left : left + width].to(dtype)
        crop = F.interpolate(crop, size, mode="bicubic", antialias=True, align_corners=False)
        crops.append(crop.flip(-1) if flip else crop)
    out = torch.cat(crops)
    return out.round().clamp(0, 255).to(torch.uint8) if rounded else out


def normalize(
    images: Tensor, mean: Values | None = None, std: Values | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """uint8 pixels to [0, 1], uint16 as they are, then ``(x - mean[c]) / std[c]``."""
    if not images.is_floating_point():
        images = images.to(dtype or torch.get_default_dtype()) / (255 if images.dtype == torch.uint8 else 1)
    if mean is not None:
        shape = (-1, *[1] * (images.ndim - 2))
        mean, std = (torch.as_tensor(v, dtype=images.dtype, device=images.device).view(shape) for v in (mean, std))
        images = (images - mean) / std
    return images


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    ids_keep: Tensor | None = None,
    *,
    prefix: Tensor | None = None,
    mean: Values | None = None,
    std: Values | None = None,
) -> Tensor:
    """Section 3, "MAE encoder": embed all patches, add positions, keep the visible ones, prepend the class token."""
    images = normalize(images, mean, std, weight.dtype)
    weight = weight[:, :, None] if weight.ndim < images.ndim else weight
    tokens = (F.conv2d if images.ndim == 4 else F.conv3d)(images, weight, bias, stride=weight.shape[2:])
    tokens = rearrange(tokens, "n d ... -> n (...) d")
    if pos_embed is not None:
        tokens = tokens + pos_embed
    if ids_keep is not None:
        tokens = gather_tokens(tokens, ids_keep)
    if prefix is not None:
        prefix = prefix.expand(len(tokens), -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
    return tokens


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens [N, L, D] at ids [N, K]; zeros for an id of -1."""
    index = repeat(ids.clamp(min=0), "n k -> n k d", d=tokens.shape[2]).contiguous()
    return torch.gather(tokens, 1, index).masked_fill((ids < 0)[:, :, None], 0)


def scatter_mask_tokens(
    tokens: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None = None, *, num_prefix: int = 1
) -> Tensor:
    """Section 3, "MAE decoder": append mask tokens, un-shuffle, add positions to the full set."""
    prefix, visible = tokens[:, :num_prefix], tokens[:, num_prefix:]
    num_masked = max(ids_restore.shape[1] - visible.shape[1], 1)
    mask_tokens = repeat(mask_token.flatten(), "d -> n m d", n=len(tokens), m=num_masked).contiguous()
    full = torch.cat([visible, mask_tokens], dim=1)
    full = gather_tokens(full, ids_restore.clamp(max=full.shape[1] - 1))  # behind a row with fewer visible patches
    full = torch.cat([prefix, full], dim=1)
    if pos_embed is not None:
        pos_embed = pos_embed.reshape(-1, pos_embed.shape[-1])
        has_no_prefix_rows = len(pos_embed) == ids_restore.shape[1]
        full = full + (F.pad(pos_embed, (0, 0, num_prefix, 0)) if has_no_prefix_rows else pos_embed)
    return full


def patchify(images: Tensor, patch_size: Sizes, layout: Layout = "channels_last") -> Tensor:
    """Images [N, C, H, W] or [N, C, T, H, W] as patches [N, L, E]."""
    r, p, q = _patch(patch_size, images.ndim - 2)
    images = images[:, :, None] if images.ndim == 4 else images
    return rearrange(images, f"n c (t r) (h p) (w q) -> n (t h w) {_VALUES[layout]}", r=r, p=p, q=q)


def unpatchify(
    patches: Tensor, patch_size: Sizes, image_size: tuple[int, ...], layout: Layout = "channels_last"
) -> Tensor:
    """Patches [N, L, E] as images [N, C, H, W], or [N, C, T, H, W] for three sizes."""
    (t, h, _), (r, p, q) = (1, *image_size)[-3:], _patch(patch_size, len(image_size))
    sizes = {"t": t // r, "h": h // p, "r": r, "p": p, "q": q}
    images = rearrange(patches, f"n (t h w) {_VALUES[layout]} -> n c (t r) (h p) (w q)", **sizes)
    return images if len(image_size) == 3 else images[:, :, 0]


def _patch(patch_size: Sizes, sides: int) -> tuple[int, ...]:
    patch = (patch_size,) * sides if isinstance(patch_size, int) else patch_size
    return (1, *patch)[-3:]


def pixel_target(
    images: Tensor, patch_size: Sizes, norm_pix: NormPix = True, eps: float = 1e-6, layout: Layout = "channels_last"
) -> Tensor:
    """Section 3, "Reconstruction target": the pixels of every patch, normalised by its own mean and variance."""
    target = patchify(images, patch_size, layout)
    if norm_pix != "channel":
        return normalize_target(target, norm_pix, eps)
    by_channel = {"channels_last": "n l (e c)", "channels_first": "n l (c e)"}[layout]  # as VideoMAE does
    target = rearrange(target, f"{by_channel} -> n l c e", c=images.shape[1])
    target = (target - target.mean(dim=-1, keepdim=True)) / (target.std(dim=-1, keepdim=True) + eps)
    return rearrange(target, f"n l c e -> {by_channel}")


def normalize_target(target: Tensor, norm_pix: NormPix | None = True, eps: float = 1e-6) -> Tensor:
    """Every token of [N, L, E] by its own mean and variance."""
    if norm_pix:
        patch_mean = target.mean(dim=-1, keepdim=True)
        patch_var = target.var(dim=-1, keepdim=True)
        target = (target - patch_mean) / (patch_var + eps).sqrt()
    return target


def masked_mse(
    pred: Tensor,
    images: Tensor | None = None,
    *,
    patch_size: Sizes | None = None,
    mask: Tensor | None = None,
    ids_mask: Tensor | None = None,
    target: Tensor | None = None,
    norm_pix: NormPix | None = None,
    mean: Values | None = None,
    std: Values | None = None,
    eps: float = 1e-6,
    layout: Layout = "channels_last",
) -> Tensor:
    """Section 3, "Reconstruction target": squared error per patch, averaged over the masked patches."""
    if target is not None:
        target = normalize_target(target, norm_pix, eps)
    else:
        images = normalize(images, mean, std, pred.dtype)
        target = pixel_target(images, patch_size, True if norm_pix is None else norm_pix, eps, layout)
    if ids_mask is not None:
        target, mask = gather_tokens(target, ids_mask), ids_mask >= 0
        pred = pred.masked_fill(~mask[:, :, None], 0)
    mask = mask.to(target.dtype)
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def linear_masked_mse(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids_mask: Tensor, **options: Any
) -> Tensor:
    """The decoder's last layer, a linear projection to pixels, and the reconstruction loss on its output."""
    pred = F.linear(hidden, weight, bias)
    return masked_mse(pred, images, ids_mask=ids_mask, **options)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of [N, heads, T, d], every score in memory."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    return scores.softmax(dim=3) @ v


def transformer_block(
    x: Tensor, block: Any, attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention
) -> Tensor:
    """The pre-norm block of the Vision Transformer on [N, T, D], with the parameters of ``block``."""
    qkv = block.attn.qkv(block.norm1(x))
    q, k, v = rearrange(qkv, "n t (three heads d) -> three n heads t d", three=3, heads=block.attn.num_heads)
    x = x + block.attn.proj(rearrange(attention(q, k, v), "n heads t d -> n t (heads d)"))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def pretraining_loss(
    model: Any,
    images: Tensor,
    noise: Tensor,
    mask_ratio: float = 0.75,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention,
) -> Tensor:
    """The whole pass, section 3, of any model whose parts have the published names; positions include the class row."""
    n, num_patches = noise.shape
    masking = random_masking(n, num_patches, mask_ratio, noise=noise)
    proj = model.patch_embed.proj
    prefix = model.cls_token + model.pos_embed[:, :1]
    x = patch_embed(images, proj.weight, proj.bias, model.pos_embed[:, 1:], masking.ids_keep, prefix=prefix)
    for block in model.blocks:
        x = transformer_block(x, block, attention)
    x = model.decoder_embed(model.norm(x))
    x = scatter_mask_tokens(x, model.mask_token, masking.ids_restore, model.decoder_pos_embed)
    for block in model.decoder_blocks:
        x = transformer_block(x, block, attention)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    config = model.config
    return masked_mse(pred, images, patch_size=config.patch_size, mask=masking.mask, norm_pix=config.norm_pix_loss)
