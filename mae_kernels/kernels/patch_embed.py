"""Patch embedding as an implicit matrix product: its left operand is read from the images, patch by patch."""

from dataclasses import replace
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_kernels.kernels.chips import chip_of
from mae_kernels.kernels.gather_tokens import id_block, places
from mae_kernels.kernels.host import cdiv, next_power_of_2
from mae_kernels.kernels.numerics import dot, rounded
from mae_kernels.kernels.pixels import load_patch_values, patch_offsets
from mae_kernels.kernels.rows import row_tiles, split_samples
from mae_kernels.kernels.tiles import GemmTiles
from mae_kernels.patchify import patch_grid


@triton.jit
def patch_embed_kernel(
    p_images, p_mean, p_std, p_ids, p_weight, p_bias, p_pos_embed, p_prefix, p_out,
    num_rows, num_tokens, num_prefix, num_patches, grid_width,
    s_xn, s_xc, s_xh, s_xw, s_in, s_ik, s_wd, s_we, s_b, s_pl, s_pd, s_rl, s_rd,
    D: tl.constexpr, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n, R + k] = weight @ patch(images[n], ids[n, k]) + bias + pos_embed[ids[n, k]]; out[n, r] = prefix[r]."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    # Neighbours share the patches, which come from memory; the weight stays in the L2 cache.
    i = pid // blocks_d * BLOCK + tl.arange(0, BLOCK)  # [B], row n * (R + K) + j
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    m_i = i < num_rows
    m_d = d < D
    n = (i // num_tokens).to(tl.int64)
    j = i % num_tokens
    is_patch = m_i & (j >= num_prefix)
    patch = (j - num_prefix).to(tl.int64)
    if p_ids is not None:
        patch = tl.load(p_ids + n * s_in + patch * s_ik, mask=is_patch, other=0)
    m_patch = is_patch & (patch >= 0) & (patch < num_patches)

    # What is added to the product is what the sum starts from. Prefix rows have no pixels: they stay as they are.
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if p_pos_embed is not None:
        o_pos = patch[:, None] * s_pl + d[None, :] * s_pd
        acc = tl.load(p_pos_embed + o_pos, mask=m_patch[:, None] & m_d[None, :], other=0).to(tl.float32)
    if p_prefix is not None:
        o_prefix = j.to(tl.int64)[:, None] * s_rl + d[None, :] * s_rd
        m_prefix = m_i & (j < num_prefix)
        acc += tl.load(p_prefix + o_prefix, mask=m_prefix[:, None] & m_d[None, :], other=0).to(tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + d * s_b, mask=m_d, other=0).to(tl.float32)
        acc += tl.where(is_patch[:, None], bias[None, :], 0)

    o_patch = n * s_xn + patch_offsets(patch, grid_width, s_xh, s_xw, PH, PW)
    for first in range(0, C * PH, ROWS):
        x = load_patch_values(
            p_images, p_mean, p_std, o_patch, m_patch, first, s_xc, s_xh, s_xw, C, PH, PW, ROWS, COLS, DTYPE
        )
        value = tl.arange(0, ROWS * COLS)
        row, col = first + value // COLS, value % COLS  # row c * PH + p of a patch
        o_weight = d[None, :] * s_wd + (row * PW + col)[:, None] * s_we
        m_weight = ((row < C * PH) & (col < PW))[:, None] & m_d[None, :]
        w = tl.load(p_weight + o_weight, mask=m_weight, other=0)  # [ROWS * COLS, BD]
        acc = dot(x, w, acc, PRECISION)
    o_out = i.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(p_out + o_out, rounded(acc, p_out.dtype.element_ty), mask=m_i[:, None] & m_d[None, :])


@triton.jit
def _visible_patches(p_ids, i, num_rows, num_visible, num_patches, s_in, s_ik):
    # Sample n, place k and patch of each row i = n * K + k, and whether the patch exists.
    m_i = i < num_rows
    n = (i // num_visible).to(tl.int64)
    k = (i % num_visible).to(tl.int64)
    patch = k
    if p_ids is not None:
        patch = tl.load(p_ids + n * s_in + k * s_ik, mask=m_i, other=0)
    return n, k, patch, m_i & (patch >= 0) & (patch < num_patches)


@triton.jit
def weight_gradient_kernel(
    p_grad, p_images, p_mean, p_std, p_ids, p_weight, p_bias,
    num_rows, num_visible, num_patches, grid_width, rows_per_split,
    s_gn, s_gk, s_gd, s_xn, s_xc, s_xh, s_xw, s_in, s_ik,
    D: tl.constexpr, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over (n, k) of grad[n, k, d] * patch(images[n], ids[n, k])[e], and of grad[n, k, d]."""
    E: tl.constexpr = C * PH * PW
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    split = tl.program_id(2).to(tl.int64)
    m_d = d < D
    acc = tl.zeros([BLOCK_D, ROWS * COLS], tl.float32)
    acc_bias = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(2) * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, num_rows), BLOCK):
        i = start + tl.arange(0, BLOCK)  # [B], row n * K + k
        m_i = i < num_rows
        n, k, patch, m_patch = _visible_patches(p_ids, i, num_rows, num_visible, num_patches, s_in, s_ik)
        o_patch = n * s_xn + patch_offsets(patch, grid_width, s_xh, s_xw, PH, PW)
        o_grad = n * s_gn + k * s_gk
        g = tl.load(
            p_grad + o_grad[:, None] + d.to(tl.int64)[None, :] * s_gd, mask=m_i[:, None] & m_d[None, :], other=0
        )  # [B, BD]
        x = load_patch_values(
            p_images, p_mean, p_std, o_patch, m_patch, tl.program_id(1) * ROWS, s_xc, s_xh, s_xw,
            C, PH, PW, ROWS, COLS, DTYPE,
        )  # fmt: skip
        acc = dot(tl.trans(rounded(g, DTYPE)), x, acc, PRECISION)
        if p_bias is not None and tl.program_id(1) == 0:
            acc_bias += tl.sum(g.to(tl.float32), axis=0)
    value = tl.arange(0, ROWS * COLS)
    row, col = tl.program_id(1) * ROWS + value // COLS, value % COLS  # row c * PH + p of a patch
    o_weight = (split * D + d)[:, None] * E + (row * PW + col)[None, :]
    m_weight = m_d[:, None] & ((row < C * PH) & (col < PW))[None, :]
    tl.store(p_weight + o_weight, acc, mask=m_weight)
    if p_bias is not None and tl.program_id(1) == 0:
        tl.store(p_bias + split * D + d, acc_bias, mask=m_d)


@triton.jit
def image_gradient_kernel(
    p_grad, p_std, p_ids, p_weight, p_images,
    num_rows, num_visible, num_patches, grid_width,
    s_gn, s_gk, s_gd, s_in, s_ik, s_wd, s_we, s_xn, s_xc, s_xh, s_xw,
    D: tl.constexpr, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """patch(images[n], ids[n, k])[e] = sum_d grad[n, k, d] * weight[d, e] / std[c]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [B], row n * K + k
    value = tl.arange(0, ROWS * COLS)
    row, col = tl.program_id(1) * ROWS + value // COLS, value % COLS  # row c * PH + p of a patch
    m_i = i < num_rows
    m_value = (row < C * PH) & (col < PW)
    n, k, patch, m_patch = _visible_patches(p_ids, i, num_rows, num_visible, num_patches, s_in, s_ik)
    o_grad = n * s_gn + k * s_gk
    acc = tl.zeros([BLOCK, ROWS * COLS], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)  # [BD]
        m_d = d < D
        g = tl.load(
            p_grad + o_grad[:, None] + d.to(tl.int64)[None, :] * s_gd, mask=m_i[:, None] & m_d[None, :], other=0
        )  # [B, BD]
        o_weight = d[:, None] * s_wd + (row * PW + col)[None, :] * s_we
        w = tl.load(p_weight + o_weight, mask=m_d[:, None] & m_value[None, :], other=0)  # [BD, ROWS * COLS]
        acc = dot(rounded(g, DTYPE), w, acc, PRECISION)
    if p_std is not None:
        acc /= tl.load(p_std + row // PH, mask=m_value, other=1).to(tl.float32)[None, :]
    o_patch = n * s_xn + patch_offsets(patch, grid_width, s_xh, s_xw, PH, PW)
    o_pixel = (row // PH).to(tl.int64) * s_xc + (row % PH).to(tl.int64) * s_xh + col * s_xw
    pixels = rounded(acc, p_images.dtype.element_ty)
    tl.store(p_images + o_patch[:, None] + o_pixel[None, :], pixels, mask=m_patch[:, None] & m_value[None, :])


@triton.jit
def position_gradient_kernel(
    p_grad, p_ids, p_pos_embed,
    num_samples, num_visible, num_patches, samples_per_split,
    s_gn, s_gk, s_gd, s_in, s_ik,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """Partial sums over n of grad[n, k] where ids[n, k] = l."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR], patch l
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)  # [BD]
    split = tl.program_id(2)
    m_d = d < D
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    first = split * samples_per_split
    for sample in range(first, tl.minimum(first + samples_per_split, num_samples)):
        n = tl.cast(sample, tl.int64)
        k = places(p_ids + n * s_in, i, num_visible, s_ik, BLOCK_ROWS, BLOCK_IDS)
        o_grad = n * s_gn + k.to(tl.int64) * s_gk
        m_grad = (k >= 0)[:, None] & m_d[None, :]
        acc += tl.load(p_grad + o_grad[:, None] + (d * s_gd)[None, :], mask=m_grad, other=0).to(tl.float32)
    o_out = (split * num_patches + i).to(tl.int64) * D
    tl.store(p_pos_embed + o_out[:, None] + d[None, :], acc, mask=(i < num_patches)[:, None] & m_d[None, :])


def projection_tiles(num_rows: int, d: int, patch_width: int, dtype: torch.dtype, chip: str) -> GemmTiles:
    """Tiles of patch_embed.

    From the inspector and the floors, 2026-11; not measured on a GPU. 128 x 128 is 64 accumulators a thread, in at most
    218 registers on sm_90 (Triton 3.7; 3.6 spills where bfloat16 pixels meet float32 tables); with 4 warps it spills,
    and 64 x 256 takes more shared memory for the same traffic.
    """
    cols = next_power_of_2(patch_width)
    if dtype == torch.float32:
        # Three products of TF32 halves each: 128 x 64 takes at most 179 registers, 128 x 128 249 on sm_90.
        tokens, width, values, num_warps = 128, 64, 32, 8
    elif cols == patch_width:
        tokens, width, values, num_warps = 128, 128, 64, 8
    else:
        # Padded rows of pixels cost addresses: 64 values of patches of 14 spill on sm_80, 32 take 214 registers.
        tokens, width, values, num_warps = 128, 128, 32, 8
    if cdiv(num_rows, tokens) * cdiv(d, width) < 128:  # fewer programs than multiprocessors
        tokens, width, num_warps = 64, 64, 4
    num_stages = 2 if chip == "gfx942" else 3  # gfx942 has 64 KiB of shared memory, the others 99 KiB and more
    return GemmTiles(tokens, width, max(values // cols, 1), cols, num_warps, num_stages)


def gradient_tiles(patch_width: int, dtype: torch.dtype, grad_dtype: torch.dtype, chip: str) -> GemmTiles:
    """Tiles of the weight's gradient, and in part of the images'.

    From the inspector and the floors, 2026-11; not measured on a GPU. 128 x 128 over 64 tokens takes at most 224
    registers with 8 warps on sm_90 (Triton 3.7) and spills with 4. Over 64 tokens of a float32 gradient it spills on
    sm_80. float32 products halve the width, for their TF32 halves.
    """
    cols = next_power_of_2(patch_width)
    if dtype == torch.float32:
        return GemmTiles(32, 64, max(64 // cols, 1), cols, num_warps=4, num_stages=2)
    tokens = 32 if grad_dtype == torch.float32 else 64
    num_stages = 2 if chip == "gfx942" else 3
    return GemmTiles(tokens, 128, max(128 // cols, 1), cols, num_warps=8, num_stages=num_stages)


def image_gradient_tiles(patch_width: int, dtype: torch.dtype, grad_dtype: torch.dtype, chip: str) -> GemmTiles:
    depth = 16 if dtype == torch.float32 else 64  # 32 in float32 take all 255 registers on sm_80
    # 64 rows are the fewest that a product takes on sm_90 and sm_100.
    return replace(gradient_tiles(patch_width, dtype, grad_dtype, chip), tokens=64, width=depth)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    ids_keep: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    n, (d, c, ph, pw) = images.shape[0], weight.shape
    grid = patch_grid(images, weight.shape[2:])
    num_patches = prod(grid)
    num_prefix = 0 if prefix is None else prefix.shape[0]
    num_tokens = num_prefix + (num_patches if ids_keep is None else ids_keep.shape[1])
    rows = n * num_tokens
    out = images.new_empty((n, num_tokens, d), dtype=out_dtype)
    mean, std = (x if x is None else x.contiguous() for x in (mean, std))  # read without strides
    weight = weight.flatten(1).to(compute_dtype)
    chip = chip_of(images.device)
    tiles = projection_tiles(rows, d, pw, compute_dtype, chip)
    patch_embed_kernel[(cdiv(rows, tiles.tokens) * cdiv(d, tiles.width),)](
        images, mean, std, ids_keep, weight, bias, pos_embed, prefix, out,
        rows, num_tokens, num_prefix, num_patches, grid[1],
        *images.stride(), *_strides(ids_keep, 2), *weight.stride(), *_strides(bias, 1), *_strides(pos_embed, 2),
        *_strides(prefix, 2),
        D=d, C=c, PH=ph, PW=pw, BLOCK=tiles.tokens, BLOCK_D=tiles.width, ROWS=tiles.rows, COLS=tiles.cols,
        DTYPE=_TRITON[compute_dtype], PRECISION=_precision(compute_dtype, chip),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def patch_embed_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    ids_keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    num_prefix: int,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_images, needs_weight, needs_bias, needs_pos, needs_prefix = needs
    g_images, g_weight, g_bias, g_pos, g_prefix = (grad.new_empty(0, dtype=torch.float32) for _ in needs)
    mean, std = (x if x is None else x.contiguous() for x in (mean, std))  # read without strides
    g_tokens = grad[:, num_prefix:]  # [N, K, D]
    if needs_weight:
        g_weight, g_bias = _weight_gradient(g_tokens, images, weight, ids_keep, mean, std, compute_dtype, needs_bias)
    elif needs_bias:
        g_bias = g_tokens.sum((0, 1), dtype=torch.float32)
    if needs_pos and ids_keep is None:
        g_pos = g_tokens.sum(0, dtype=torch.float32)
    elif needs_pos:
        g_pos = _position_gradient(g_tokens, ids_keep, images, weight)
    if needs_prefix:
        g_prefix = grad[:, :num_prefix].sum(0, dtype=torch.float32)
    if needs_images:
        g_images = _image_gradient(g_tokens, images, weight, ids_keep, std, compute_dtype)
    return g_images, g_weight, g_bias, g_pos, g_prefix


def _weight_gradient(grad, images, weight, ids, mean, std, dtype, needs_bias):
    (n, k, d), (_, c, ph, pw) = grad.shape, weight.shape
    grid = patch_grid(images, (ph, pw))
    chip = chip_of(images.device)
    tiles = gradient_tiles(pw, dtype, grad.dtype, chip)
    blocks_d, blocks_e = cdiv(d, tiles.width), cdiv(c * ph, tiles.rows)
    # About 264 programs, two for each multiprocessor of a large chip, but no split of less than four blocks of tokens.
    splits = max(1, min(264 // (blocks_d * blocks_e), n * k // (4 * tiles.tokens)))
    per_split = cdiv(cdiv(n * k, splits), tiles.tokens) * tiles.tokens
    splits = cdiv(n * k, per_split)
    g_weight = grad.new_empty((splits, *weight.shape), dtype=torch.float32)
    g_bias = grad.new_empty((splits, d) if needs_bias else 0, dtype=torch.float32)
    weight_gradient_kernel[(blocks_d, blocks_e, splits)](
        grad, images, mean, std, ids, g_weight, g_bias if needs_bias else None,
        n * k, k, prod(grid), grid[1], per_split,
        *grad.stride(), *images.stride(), *_strides(ids, 2),
        D=d, C=c, PH=ph, PW=pw, BLOCK=tiles.tokens, BLOCK_D=tiles.width, ROWS=tiles.rows, COLS=tiles.cols,
        DTYPE=_TRITON[dtype], PRECISION=_precision(dtype, chip),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return g_weight.sum(0), g_bias.sum(0) if needs_bias else g_bias


def _image_gradient(grad, images, weight, ids, std, dtype):
    (n, k, d), (_, c, ph, pw) = grad.shape, weight.shape
    grid = patch_grid(images, (ph, pw))
    chip = chip_of(images.device)
    tiles = image_gradient_tiles(pw, dtype, grad.dtype, chip)
    # Patches that were not embedded have no gradient.
    g_images = (images.new_empty if ids is None else images.new_zeros)(images.shape)
    rows_of_weight = weight.flatten(1).to(dtype)
    image_gradient_kernel[(cdiv(n * k, tiles.tokens), cdiv(c * ph, tiles.rows))](
        grad, std, ids, rows_of_weight, g_images,
        n * k, k, prod(grid), grid[1],
        *grad.stride(), *_strides(ids, 2), *rows_of_weight.stride(), *g_images.stride(),
        D=d, C=c, PH=ph, PW=pw, BLOCK=tiles.tokens, BLOCK_D=tiles.width, ROWS=tiles.rows, COLS=tiles.cols,
        DTYPE=_TRITON[dtype], PRECISION=_precision(dtype, chip),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return g_images


def _position_gradient(grad, ids, images, weight):
    n, k, d = grad.shape
    num_patches = prod(patch_grid(images, weight.shape[2:]))
    tiles = row_tiles(d)
    blocks_l, blocks_d = cdiv(num_patches, tiles.rows), cdiv(d, tiles.width)
    splits, per_split = split_samples(n, blocks_l * blocks_d)
    g_pos = grad.new_empty((splits, num_patches, d), dtype=torch.float32)
    position_gradient_kernel[(blocks_l, blocks_d, splits)](
        grad, ids, g_pos,
        n, k, num_patches, per_split,
        *grad.stride(), *ids.stride(),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, BLOCK_IDS=id_block(k), num_warps=tiles.num_warps,
    )  # fmt: skip
    return g_pos.sum(0)


_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _precision(dtype: torch.dtype, chip: str) -> str:
    # On NVIDIA chips float32 is three products of TF32 halves: the accuracy of float32 at tensor-core rate.
    return "tf32x3" if dtype == torch.float32 and chip != "gfx942" else "ieee"


def _strides(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    return (0,) * ndim if x is None else x.stride()
