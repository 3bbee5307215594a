"""What surrounds the vendor's matrix product of the patch embedding: patches read from the images, positions added."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..patch_embed import Steps
from ..patch_grid import PatchGrid
from .gather_tokens import gather_tokens_backward, id_block, inverse_ids
from .host import cdiv, strides
from .numerics import rounded
from .pixels import decoded_values, load_values, patch_offsets
from .rows import row_tiles, split_samples


@triton.jit
def gather_patches_kernel(
    p_images, p_statistics, p_ids, p_out,
    num_rows, num_visible, num_patches, grid_h, grid_w,
    s_xn, s_xc, s_xt, s_xh, s_xw, s_in, s_ik,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[n, k] = patch(images[n], ids[n, k]), normalised; a row of zeros for an id out of range."""
    E: tl.constexpr = C * PT * PH * PW
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR], row n * K + k
    m_i = i < num_rows
    n = (i // num_visible).to(tl.int64)
    k = (i % num_visible).to(tl.int64)
    patch = k
    if p_ids is not None:
        patch = tl.load(p_ids + n * s_in + k * s_ik, mask=m_i, other=0)
    m_patch = m_i & (patch >= 0) & (patch < num_patches)
    o_patch = n * s_xn + patch_offsets(patch, grid_h, grid_w, s_xt, s_xh, s_xw, PT, PH, PW)
    o_out = i.to(tl.int64) * E
    for block in tl.static_range(0, E, BLOCK_E):
        e = block + tl.arange(0, BLOCK_E)  # [BE]
        o_e, mean, inverse = decoded_values(
            p_statistics, block, C, s_xc, s_xt, s_xh, s_xw,
            C, PT, PH, PW, CHANNELS_LAST=False, WIDE=True, VALUES=BLOCK_E,
        )  # fmt: skip
        x = load_values(p_images, o_patch, m_patch, block, o_e, mean, inverse, E)
        x = rounded(tl.where(m_patch[:, None], x, 0), p_out.dtype.element_ty)
        tl.store(p_out + o_out[:, None] + e[None, :], x, mask=m_i[:, None] & (e < E)[None, :])


@triton.jit
def add_positions_kernel(
    p_tokens, p_ids, p_pos_embed, p_prefix, p_out,
    num_rows, num_out, num_prefix, num_patches,
    s_in, s_ik, s_pl, s_pd, s_rl, s_rd,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, R + k] = tokens[n, k] + pos_embed[ids[n, k]], zeros for an id of -1; out[n, r] = prefix[r]."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR], row n * (R + K) + j
    m_i = i < num_rows
    n = (i // num_out).to(tl.int64)
    j = (i % num_out).to(tl.int64)
    is_prefix = m_i & (j < num_prefix)
    is_patch = m_i & (j >= num_prefix)
    patch = j - num_prefix
    o_token = (n * (num_out - num_prefix) + patch) * D
    if p_ids is not None:
        patch = tl.load(p_ids + n * s_in + patch * s_ik, mask=is_patch, other=-1)
    is_patch = is_patch & (patch >= 0)
    m_pos = is_patch & (patch < num_patches)
    o_out = i.to(tl.int64) * D
    for block in tl.static_range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D).to(tl.int64)  # [BD]
        m_d = (d < D)[None, :]
        x = tl.load(p_tokens + o_token[:, None] + d[None, :], mask=is_patch[:, None] & m_d, other=0).to(tl.float32)
        if p_pos_embed is not None:
            o_pos = patch[:, None] * s_pl + (d * s_pd)[None, :]
            x += tl.load(p_pos_embed + o_pos, mask=m_pos[:, None] & m_d, other=0).to(tl.float32)
        if p_prefix is not None:
            o_prefix = j[:, None] * s_rl + (d * s_rd)[None, :]
            x += tl.load(p_prefix + o_prefix, mask=is_prefix[:, None] & m_d, other=0).to(tl.float32)
        tl.store(p_out + o_out[:, None] + d[None, :], rounded(x, p_out.dtype.element_ty), mask=m_i[:, None] & m_d)


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
        k = inverse_ids(p_ids + n * s_in, i, num_visible, s_ik, BLOCK_ROWS, BLOCK_IDS)
        o_grad = n * s_gn + k.to(tl.int64) * s_gk
        m_grad = (k >= 0)[:, None] & m_d[None, :]
        acc += tl.load(p_grad + o_grad[:, None] + (d * s_gd)[None, :], mask=m_grad, other=0).to(tl.float32)
    o_out = (split * num_patches + i).to(tl.int64) * D
    tl.store(p_pos_embed + o_out[:, None] + d[None, :], acc, mask=(i < num_patches)[:, None] & m_d[None, :])


def _gather_patches(
    images: Tensor, ids: Tensor | None, grid: PatchGrid, statistics: Tensor | None, dtype: torch.dtype
) -> Tensor:
    visible = grid.num_patches if ids is None else ids.shape[1]
    statistics = None if statistics is None else statistics.contiguous()  # read without strides
    out = images.new_empty((len(images) * visible, grid.patch_values), dtype=dtype)
    (pt, ph, pw), (_, grid_h, grid_w), tiles = grid.patch, grid.grid, row_tiles(grid.patch_values)
    gather_patches_kernel[(cdiv(len(out), tiles.rows),)](
        images, statistics, ids, out,
        len(out), visible, grid.num_patches, grid_h, grid_w,
        *images.stride(), *strides(ids),
        C=grid.channels, PT=pt, PH=ph, PW=pw, BLOCK_ROWS=tiles.rows, BLOCK_E=tiles.width, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def _add_positions(
    tokens: Tensor, pos_embed: Tensor | None, ids: Tensor | None, prefix: Tensor | None, dtype: torch.dtype
) -> Tensor:
    n, k, d = tokens.shape
    num_prefix = 0 if prefix is None else prefix.shape[0]
    out = tokens.new_empty((n, num_prefix + k, d), dtype=dtype)
    tiles = row_tiles(d)
    add_positions_kernel[(cdiv(n * (num_prefix + k), tiles.rows),)](
        tokens, ids, pos_embed, prefix, out,
        n * (num_prefix + k), num_prefix + k, num_prefix, 0 if pos_embed is None else pos_embed.shape[0],
        *strides(ids), *strides(pos_embed), *strides(prefix),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def _position_gradient(grad: Tensor, ids: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    n, k, d = grad.shape
    tiles = row_tiles(d)
    blocks_l, blocks_d = cdiv(num_patches, tiles.rows), cdiv(d, tiles.width)
    splits, per_split = split_samples(n, blocks_l * blocks_d)
    g_pos = grad.new_empty((splits, num_patches, d), dtype=dtype)
    position_gradient_kernel[(blocks_l, blocks_d, splits)](
        grad, ids, g_pos,
        n, k, num_patches, per_split,
        *grad.stride(), *ids.stride(),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, BLOCK_IDS=id_block(k), num_warps=tiles.num_warps,
    )  # fmt: skip
    return g_pos.sum(0)


_STEPS = Steps(_gather_patches, _add_positions, gather_tokens_backward, _position_gradient)
patch_embed: Callable[..., Tensor] = _STEPS.embed
patch_embed_backward: Callable[..., tuple[Tensor, ...]] = _STEPS.gradients
