"""The ops in PyTorch's own, for programs that leave PyTorch.

``torch.onnx.export`` traces these in the ops' place; other exporters take an exported program that was decomposed by
:func:`table`. As in reference.py nothing is fused, and every result is that of the op.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .masked_mse import NormPix
from .patch_embed import Inputs
from .patch_grid import three_sides
from .precision import accumulation_dtype
from .registration import overload


def masking(
    noise: Tensor, counts: Tensor | None, num_keep: int, num_mask: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    chosen = torch.gather(tokens, 1, ids.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.where((ids >= 0)[:, :, None], chosen, 0)


def patch_embed(*inputs: Any) -> Tensor:
    x = Inputs(*inputs)
    pixels, ids_keep = _pixels(x.images, x.statistics, x.compute_dtype), x.ids_keep
    patches = reference.patchify(pixels, three_sides(x.weight.shape[2:]), "channels_first")
    patches = patches if ids_keep is None else gather_tokens(patches, ids_keep)
    bias = None if x.bias is None else x.bias.to(x.compute_dtype)
    tokens = F.linear(patches, x.weight.to(x.compute_dtype).flatten(1), bias)
    if x.pos_embed is not None:
        tokens = tokens + (x.pos_embed if ids_keep is None else x.pos_embed[ids_keep])
    if ids_keep is not None:
        tokens = torch.where((ids_keep >= 0)[:, :, None], tokens, 0)
    if x.prefix is not None:
        tokens = torch.cat([x.prefix[None].expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens.to(x.out_dtype)


def scatter_mask_tokens(
    tokens: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, num_tokens, d = tokens.shape
    patches = torch.cat([tokens[:, num_prefix:], mask_token.expand(n, 1, d)], dim=1)
    patches = gather_tokens(patches, ids_restore.clamp(max=num_tokens - num_prefix))
    out = torch.cat([tokens[:, :num_prefix], patches], dim=1)
    if pos_embed is not None:
        out = out + F.pad(pos_embed, (0, 0, out.shape[1] - pos_embed.shape[0], 0))
    return out.to(out_dtype)


def masked_mse(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, keep_residual: bool, *target: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (patch, norm_pix, eps, layout) = accumulation_dtype(pred.dtype), target
    patches = reference.pixel_target(_pixels(images, statistics, dtype), tuple(patch), _NORM_PIX[norm_pix], eps, layout)
    if selected.dtype == torch.int64:
        patches, selected = gather_tokens(patches, selected), selected >= 0
    residual = torch.where(selected[:, :, None] != 0, pred.to(dtype) - patches, 0)
    scale = 2 / (selected.to(dtype).sum().clamp(min=1) * pred.shape[2])
    loss = residual.square().sum() * (scale / 2)
    return loss, residual.to(pred.dtype) if keep_residual else pred.new_empty(0), scale


def linear_masked_mse(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids_mask: Tensor, statistics: Tensor | None,
    compute_dtype: torch.dtype, needs: list[bool], *target: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, weight, bias = (
        hidden.to(compute_dtype),
        weight.to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
    )
    pred = F.linear(hidden, weight, bias)
    loss, residual, scale = masked_mse(pred, images, ids_mask, statistics, any(needs), *target)
    residual, scale = residual / weight.shape[0], scale * weight.shape[0]
    sum_dtype, empty = accumulation_dtype(compute_dtype), hidden.new_empty(0)
    g_hidden = residual @ weight if needs[0] else empty
    g_weight = (residual.flatten(0, 1).t() @ hidden.flatten(0, 1)).to(sum_dtype) if needs[1] else empty
    g_bias = residual.sum((0, 1), dtype=sum_dtype) if needs[2] else empty
    return loss, g_hidden, g_weight, g_bias, scale


_NORM_PIX: dict[str, NormPix] = {"none": False, "patch": True, "channel": "channel"}


def _pixels(images: Tensor, statistics: Tensor | None, dtype: torch.dtype) -> Tensor:
    if statistics is None and images.is_floating_point():
        return images.to(dtype)
    work = accumulation_dtype(dtype)
    images = images.to(work) if images.is_floating_point() else images
    mean, std = (None, None) if statistics is None else statistics
    return reference.normalize(images, mean, std, work).to(dtype)


BY_NAME = {
    f.__name__: f for f in (masking, gather_tokens, patch_embed, scatter_mask_tokens, masked_mse, linear_masked_mse)
}


def table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """For ``program.run_decompositions({**torch.export.default_decompositions(), **table()})``."""
    return {overload(name): f for name, f in BY_NAME.items()}
