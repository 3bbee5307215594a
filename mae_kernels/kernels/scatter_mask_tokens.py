"""Assemble the decoder's input; every row is written once, and every row of the gradient is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registration import only_needed
from .host import cdiv, strides
from .numerics import rounded
from .rows import row_tiles, split_samples


@triton.jit
def scatter_mask_tokens_kernel(
    p_tokens, p_mask_token, p_ids_restore, p_pos_embed, p_out,
    num_rows, num_out, num_tokens, num_prefix, first_pos,
    s_tn, s_tl, s_td, s_md, s_in, s_il, s_pl, s_pd,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, R + l] = (tokens[n, R + r] if r < K else mask_token) + pos_embed[l] with r = ids_restore[n, l]."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR], row n * (R + L) + j
    m_i = i < num_rows
    n = (i // num_out).to(tl.int64)
    j = (i % num_out).to(tl.int64)
    is_patch = m_i & (j >= num_prefix)
    rank = tl.load(p_ids_restore + n * s_in + (j - num_prefix) * s_il, mask=is_patch, other=0)
    source = tl.where(is_patch, num_prefix + rank, j)
    is_token = m_i & (rank >= 0) & (source < num_tokens)
    has_pos = m_i & (j >= first_pos)
    o_token = n * s_tn + source * s_tl
    o_pos = (j - first_pos) * s_pl
    o_out = i.to(tl.int64) * D
    for block in tl.static_range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D).to(tl.int64)  # [BD]
        m_d = (d < D)[None, :]
        mask_token = tl.load(p_mask_token + d * s_md, mask=d < D, other=0).to(tl.float32)
        x = tl.load(p_tokens + o_token[:, None] + (d * s_td)[None, :], mask=is_token[:, None] & m_d, other=0)
        x = tl.where(is_token[:, None], x.to(tl.float32), mask_token[None, :])
        if p_pos_embed is not None:
            pos = tl.load(p_pos_embed + o_pos[:, None] + (d * s_pd)[None, :], mask=has_pos[:, None] & m_d, other=0)
            x += pos.to(tl.float32)
        x = rounded(x, p_out.dtype.element_ty)
        tl.store(p_out + o_out[:, None] + d[None, :], x, mask=m_i[:, None] & m_d)


@triton.jit
def scatter_mask_tokens_backward_kernel(
    p_grad, p_ids_restore, p_tokens, p_mask_token, p_pos_embed,
    num_samples, num_out, num_tokens, num_prefix, first_pos, samples_per_split, blocks_j,
    s_gn, s_gl, s_gd, s_in, s_il,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g_tokens[n, R + r] = grad[n, R + l] for r < K; partial sums of the other rows, and of each row over n.

    A row with K - k visible patches numbers as many hidden ones from L on as it has tokens that nobody reads: hidden
    patch L + i writes the zeros of token K - 1 - i. So every row of g_tokens is written once.
    """
    j = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BR]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # [BD]
    split = tl.program_id(2)
    m_j = j < num_out
    m_d = d < D
    is_patch = m_j & (j >= num_prefix)
    g_mask_token = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    g_pos_embed = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    first = split * samples_per_split
    for sample in range(first, tl.minimum(first + samples_per_split, num_samples)):
        n = tl.cast(sample, tl.int64)
        rank = tl.load(p_ids_restore + n * s_in + (j - num_prefix) * s_il, mask=is_patch, other=0)
        target = tl.where(is_patch, num_prefix + rank, j)
        is_token = m_j & (rank >= 0) & (target < num_tokens)
        unread = num_tokens - 1 - rank + num_out - num_prefix
        is_unread = is_patch & (rank >= num_out - num_prefix) & (unread >= num_prefix)
        target = tl.where(is_unread, unread, target)
        m_row = m_j
        if p_mask_token is None and p_pos_embed is None:
            m_row = is_token
        o_grad = n * s_gn + j * s_gl
        g = tl.load(
            p_grad + o_grad[:, None] + (d * s_gd)[None, :], mask=m_row[:, None] & m_d[None, :], other=0
        )  # [BR, BD]
        if p_tokens is not None:
            o_token = (n * num_tokens + target) * D
            row = rounded(tl.where(is_token[:, None], g, 0), p_tokens.dtype.element_ty)
            m_token = (is_token | is_unread)[:, None] & m_d[None, :]
            tl.store(p_tokens + o_token[:, None] + d[None, :], row, mask=m_token)
        if p_mask_token is not None:
            g_mask_token += tl.where(is_token[:, None], 0, g.to(tl.float32))
        if p_pos_embed is not None:
            g_pos_embed += g.to(tl.float32)
    if p_mask_token is not None:
        o_partial = (split * blocks_j + tl.program_id(0)).to(tl.int64) * D
        tl.store(p_mask_token + o_partial + d, tl.sum(g_mask_token, axis=0), mask=m_d)
    if p_pos_embed is not None:
        o_partial = (split * (num_out - first_pos) + j - first_pos) * D
        m_pos = m_j & (j >= first_pos)
        tl.store(p_pos_embed + o_partial[:, None] + d[None, :], g_pos_embed, mask=m_pos[:, None] & m_d[None, :])


def scatter_mask_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos_embed: Tensor | None,
    num_prefix: int,
    out_dtype: torch.dtype,
) -> Tensor:
    n, num_tokens, d = tokens.shape
    num_out = num_prefix + ids_restore.shape[1]
    tiles = row_tiles(d)
    out = tokens.new_empty((n, num_out, d), dtype=out_dtype)
    first_pos = 0 if pos_embed is None else num_out - pos_embed.shape[0]
    scatter_mask_tokens_kernel[(cdiv(n * num_out, tiles.rows),)](
        tokens, mask_token, ids_restore, pos_embed, out,
        n * num_out, num_out, num_tokens, num_prefix, first_pos,
        *tokens.stride(), *mask_token.stride(), *ids_restore.stride(), *strides(pos_embed),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def scatter_mask_tokens_backward(
    grad: Tensor,
    ids_restore: Tensor,
    num_tokens: int,
    num_prefix: int,
    pos_rows: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    n, num_out, d = grad.shape
    tiles = row_tiles(d)
    blocks_j, blocks_d = cdiv(num_out, tiles.rows), cdiv(d, tiles.width)
    splits, per_split = split_samples(n, blocks_j * blocks_d)
    shapes = [(n, num_tokens, d), (splits * blocks_j, d), (splits, pos_rows, d)]
    grads = only_needed(grad, needs, shapes, [dtype, torch.float32, torch.float32])
    scatter_mask_tokens_backward_kernel[(blocks_j, blocks_d, splits)](
        grad, ids_restore, *(g if need else None for g, need in zip(grads, needs, strict=True)),
        n, num_out, num_tokens, num_prefix, num_out - pos_rows, per_split, blocks_j,
        *grad.stride(), *ids_restore.stride(),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, num_warps=tiles.num_warps,
    )  # fmt: skip
    g_tokens, *sums = grads
    return g_tokens, *(partial.sum(0) if need else partial for partial, need in zip(sums, needs[1:], strict=True))
