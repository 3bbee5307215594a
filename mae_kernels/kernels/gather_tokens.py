"""Gather tokens by id; its gradient is a gather too."""

import triton
import triton.language as tl
from torch import Tensor

from .host import cdiv, next_power_of_2
from .rows import row_tiles


@triton.jit
def gather_tokens_kernel(
    p_tokens, p_ids, p_out,
    num_rows, num_tokens, num_ids,
    s_tn, s_tl, s_td, s_in, s_ik,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, k] = tokens[n, ids[n, k]]; a row of zeros for an id out of range."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR], row n * K + k
    m_i = i < num_rows
    n = (i // num_ids).to(tl.int64)
    ids = tl.load(p_ids + n * s_in + (i % num_ids).to(tl.int64) * s_ik, mask=m_i, other=-1)
    m_row = (ids >= 0) & (ids < num_tokens)
    o_row = n * s_tn + ids * s_tl
    o_out = i.to(tl.int64) * D
    for block in tl.static_range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D).to(tl.int64)  # [BD]
        m_d = (d < D)[None, :]
        x = tl.load(p_tokens + o_row[:, None] + (d * s_td)[None, :], mask=m_row[:, None] & m_d, other=0)
        tl.store(p_out + o_out[:, None] + d[None, :], x, mask=m_i[:, None] & m_d)


@triton.jit
def inverse_ids(p_ids, i, num_ids, s_ik, BLOCK_ROWS: tl.constexpr, BLOCK_IDS: tl.constexpr):
    """The k with ids[k] = i for each i [BLOCK_ROWS], or -1: the inverse of a selection, without memory for it."""
    k = tl.full([BLOCK_ROWS], -1, tl.int32)
    for block in range(0, num_ids, BLOCK_IDS):
        candidate = block + tl.arange(0, BLOCK_IDS)  # [BI]
        ids = tl.load(p_ids + candidate.to(tl.int64) * s_ik, mask=candidate < num_ids, other=-1)
        found = tl.where(ids[None, :] == i[:, None], candidate[None, :], -1)  # [BR, BI]
        k = tl.maximum(k, tl.max(found, axis=1))
    return k


@triton.jit
def gather_tokens_backward_kernel(
    p_grad, p_ids, p_out,
    num_tokens, num_ids, blocks_per_sample,
    s_gn, s_gk, s_gd, s_in, s_ik,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """out[n, l] = grad[n, k] where ids[n, k] = l, zero where no id is l."""
    pid = tl.program_id(0)
    n = (pid // blocks_per_sample).to(tl.int64)
    i = pid % blocks_per_sample * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR], token l
    m_i = i < num_tokens
    k = inverse_ids(p_ids + n * s_in, i, num_ids, s_ik, BLOCK_ROWS, BLOCK_IDS)
    o_row = n * s_gn + k.to(tl.int64) * s_gk
    o_out = (n * num_tokens + i) * D
    for block in tl.static_range(0, D, BLOCK_D):
        d = block + tl.arange(0, BLOCK_D).to(tl.int64)  # [BD]
        m_d = (d < D)[None, :]
        g = tl.load(p_grad + o_row[:, None] + (d * s_gd)[None, :], mask=(m_i & (k >= 0))[:, None] & m_d, other=0)
        tl.store(p_out + o_out[:, None] + d[None, :], g, mask=m_i[:, None] & m_d)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    n, k = ids.shape
    d = tokens.shape[2]
    tiles = row_tiles(d)
    out = tokens.new_empty((n, k, d))
    gather_tokens_kernel[(cdiv(n * k, tiles.rows),)](
        tokens, ids, out,
        n * k, tokens.shape[1], k,
        *tokens.stride(), *ids.stride(),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    n, k, d = grad.shape
    tiles = row_tiles(d)
    out = grad.new_empty((n, num_tokens, d))
    blocks = cdiv(num_tokens, tiles.rows)
    gather_tokens_backward_kernel[(n * blocks,)](
        grad, ids, out,
        num_tokens, k, blocks,
        *grad.stride(), *ids.stride(),
        D=d, BLOCK_ROWS=tiles.rows, BLOCK_D=tiles.width, BLOCK_IDS=id_block(k), num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def id_block(num_ids: int) -> int:
    # 128 ids against 32 rows are 32 comparisons a thread.
    return min(max(next_power_of_2(num_ids), 16), 128)
