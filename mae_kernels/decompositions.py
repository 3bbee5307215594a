"""The ops in PyTorch's own, for programs that leave PyTorch.

``torch.onnx.export`` traces these in the ops' place; other exporters take an exported program that was decomposed by
:func:`table`. As in reference.py nothing is fused, and every result is that of the op.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mae_kernels import reference
from mae_kernels.precision import accumulation_dtype


def masking(noise, counts, num_keep, num_mask):
    # ONNX has no stable sort: each patch counts those before it. Among these numbers none are equal.
    noise = noise.int() if noise.dtype == torch.bool else noise.nan_to_num(torch.inf)
    n, num_patches = noise.shape
    one, other = noise[:, :, None], noise[:, None, :]
    earlier = torch.ones(num_patches, num_patches, dtype=torch.bool, device=noise.device).tril(-1)
    ids_restore = ((other < one) | ((other == one) & earlier)).sum(2)  # [N, L]
    if counts is not None:
        counts = counts.clamp(1, num_keep)[:, None]
        ids_restore = ids_restore + (ids_restore >= counts) * (num_keep - counts)
    patches = torch.arange(num_patches, device=noise.device).expand_as(ids_restore)
    ids = ids_restore.new_full((n, num_keep + num_mask), -1).scatter(1, ids_restore, patches)
    return ids[:, :num_keep].clone(), ids[:, num_keep:].clone(), ids_restore, ids_restore >= num_keep


def gather_tokens(tokens, ids):
    return torch.gather(tokens, 1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def patch_embed(images, weight, bias, pos_embed, ids_keep, prefix, mean, std, compute_dtype, out_dtype):
    pixels = _pixels(images, mean, std, compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    tokens = F.conv2d(pixels, weight.to(compute_dtype), bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = tokens if pos_embed is None else tokens + pos_embed
    tokens = tokens if ids_keep is None else gather_tokens(tokens, ids_keep)
    if prefix is not None:
        tokens = torch.cat([prefix[None].expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens.to(out_dtype)


def scatter_mask_tokens(tokens, mask_token, ids_restore, pos_embed, num_prefix, out_dtype):
    n, num_tokens, d = tokens.shape
    num_masked = ids_restore.shape[1] - num_tokens + num_prefix
    patches = torch.cat([tokens[:, num_prefix:], mask_token.expand(n, num_masked, d)], dim=1)
    out = torch.cat([tokens[:, :num_prefix], gather_tokens(patches, ids_restore)], dim=1)
    if pos_embed is not None:
        out = out + F.pad(pos_embed, (0, 0, out.shape[1] - pos_embed.shape[0], 0))
    return out.to(out_dtype)


def masked_mse(pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, keep_residual):
    dtype = accumulation_dtype(pred.dtype)
    target = reference.pixel_target(_pixels(images, mean, std, dtype), tuple(patch), norm_pix, eps, layout)
    if mask is None:
        target = gather_tokens(target, ids_mask)
        mask = torch.ones_like(ids_mask)
    residual = (pred.to(dtype) - target) * mask[:, :, None].to(dtype)
    scale = 2 / (mask.to(dtype).sum().clamp(min=1) * pred.shape[2])
    loss = residual.square().sum() * (scale / 2)
    return loss, residual.to(pred.dtype) if keep_residual else pred.new_empty(0), scale


def linear_masked_mse(
    hidden, weight, bias, images, ids_mask, patch, norm_pix, mean, std, eps, layout, compute_dtype, needs
):
    hidden, weight, bias = (None if x is None else x.to(compute_dtype) for x in (hidden, weight, bias))
    pred = F.linear(hidden, weight, bias)
    options = patch, norm_pix, mean, std, eps, layout
    loss, residual, scale = masked_mse(pred, images, None, ids_mask, *options, any(needs))
    residual, scale = residual / weight.shape[0], scale * weight.shape[0]
    sum_dtype, empty = accumulation_dtype(compute_dtype), hidden.new_empty(0)
    g_hidden = residual @ weight if needs[0] else empty
    g_weight = (residual.flatten(0, 1).t() @ hidden.flatten(0, 1)).to(sum_dtype) if needs[1] else empty
    g_bias = residual.sum((0, 1), dtype=sum_dtype) if needs[2] else empty
    return loss, g_hidden, g_weight, g_bias, scale


def _pixels(images, mean, std, dtype):
    if mean is None and images.dtype != torch.uint8:
        return images.to(dtype)
    work = accumulation_dtype(dtype)
    return reference.normalize(images if images.dtype == torch.uint8 else images.to(work), mean, std, work).to(dtype)


BY_NAME = {
    f.__name__: f for f in (masking, gather_tokens, patch_embed, scatter_mask_tokens, masked_mse, linear_masked_mse)
}


def table() -> dict[torch._ops.OpOverload, Callable]:
    """For ``program.run_decompositions({**torch.export.default_decompositions(), **table()})``."""
    return {getattr(torch.ops.mae_kernels, name).default: f for name, f in BY_NAME.items()}
