"""The loss: targets are read from the images into registers, and at most their difference from pred is written."""

from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_kernels.kernels.host import cdiv, next_power_of_2
from mae_kernels.kernels.numerics import rounded
from mae_kernels.kernels.pixels import decoded_values, load_values, patch_offsets
from mae_kernels.kernels.tiles import BlockTiles, LossTiles
from mae_kernels.patchify import patch_grid


@triton.jit
def _write_residual(
    p_pred, p_out, target, factor, first, o_pred, o_out, m_row, m_pred, s_pe,
    E: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    # Sum of (pred - target)^2 over values [B]; what is written is zero where m_pred is not set.
    e = first + tl.arange(0, VALUES)
    m_e = (e < E)[None, :]
    m_value = m_pred[:, None] & m_e
    pred = tl.load(p_pred + o_pred[:, None] + (e.to(tl.int64) * s_pe)[None, :], mask=m_value, other=0)
    residual = tl.where(m_value, pred.to(tl.float32) - target, 0)  # [B, VALUES]
    if p_out is not None:
        out = rounded(residual * factor, p_out.dtype.element_ty)
        tl.store(p_out + o_out[:, None] + e[None, :], out, mask=m_row[:, None] & m_e)
    return tl.sum(residual * residual, axis=1)


@triton.jit
def _moment(x, mean, first, POWER: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr):
    # Sum of (x - mean)^POWER over values, POWER 1 or 2: [B].
    x = tl.where((first + tl.arange(0, VALUES) < E)[None, :], x - mean[:, None], 0)
    if POWER == 2:
        x *= x
    return tl.sum(x, axis=1)


@triton.jit
def masked_mse_kernel(
    p_pred, p_images, p_mean, p_std, p_mask, p_ids_mask, p_grad, p_scale, p_out, p_sums, p_counts,
    num_rows, rows_per_sample, num_patches, grid_width, blocks_per_program, eps,
    s_pn, s_pl, s_pe, s_xn, s_xc, s_xh, s_xw, s_in, s_il,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    NORM_PIX: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """residual = pred - target on masked patches; partial sums of residual^2, and of the mask.

    out = residual, or its product with grad * scale where these are given: the gradient of pred.
    """
    E: tl.constexpr = C * PH * PW
    pid = tl.program_id(0)
    factor = 1.0
    if p_grad is not None:
        factor = tl.load(p_grad).to(tl.float32) * tl.load(p_scale)
    # All patches share these. The compiler does not move loads out of a loop that stores.
    o_pivot, mean_pivot, inverse_pivot = decoded_values(
        p_mean, p_std, 0, s_xc, s_xh, s_xw, C, PH, PW, CHANNELS_LAST, WIDE, 1
    )
    o_e, mean_e, inverse_e = decoded_values(p_mean, p_std, 0, s_xc, s_xh, s_xw, C, PH, PW, CHANNELS_LAST, WIDE, VALUES)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for turn in range(blocks_per_program):
        i = (pid * blocks_per_program + turn) * BLOCK + tl.arange(0, BLOCK)  # [B], row n * rows_per_sample + j
        m_i = i < num_rows
        n = (i // rows_per_sample).to(tl.int64)
        j = (i % rows_per_sample).to(tl.int64)
        if p_ids_mask is not None:
            patch = tl.load(p_ids_mask + n * s_in + j * s_il, mask=m_i, other=0)
            m_pred = m_i & (patch >= 0) & (patch < num_patches)
        else:
            patch = j
            m_pred = m_i & (tl.load(p_mask + n * s_in + j * s_il, mask=m_i, other=0) != 0)
            count += m_pred.to(tl.int32)
        o_patch = n * s_xn + patch_offsets(patch, grid_width, s_xh, s_xw, PH, PW)
        o_pred = (n * s_pn + j * s_pl) * UNIT
        o_out = i.to(tl.int64) * E

        x = load_values(p_images, o_patch, m_pred, 0, o_e, mean_e, inverse_e, E)  # [B, VALUES]
        pivot = tl.zeros([BLOCK, 1], tl.float32)
        mean = tl.zeros([BLOCK], tl.float32)
        scale = tl.full([BLOCK], 1, tl.float32)
        if NORM_PIX:
            # A sum of equal values rounds, which the division by their tiny deviation magnifies: differences from the
            # first value have no such error.
            pivot = load_values(p_images, o_patch, m_pred, 0, o_pivot, mean_pivot, inverse_pivot, E)
            x -= pivot
            # Two passes: the variance is never a difference of two large sums.
            for power in tl.static_range(1, 3):
                moment = _moment(x, mean, 0, power, E, VALUES)
                for first in range(VALUES, E, VALUES):
                    o, m, inverse = decoded_values(
                        p_mean, p_std, first, s_xc, s_xh, s_xw, C, PH, PW, CHANNELS_LAST, WIDE, VALUES
                    )
                    more = load_values(p_images, o_patch, m_pred, first, o, m, inverse, E) - pivot
                    moment += _moment(more, mean, first, power, E, VALUES)
                if power == 1:
                    mean = moment / E
                else:
                    scale = 1 / tl.sqrt_rn(moment / (E - 1) + eps)
        target = (x - mean[:, None]) * scale[:, None]
        total += _write_residual(p_pred, p_out, target, factor, 0, o_pred, o_out, m_i, m_pred, s_pe, E, VALUES)
        for first in range(VALUES, E, VALUES):
            o, m, inverse = decoded_values(
                p_mean, p_std, first, s_xc, s_xh, s_xw, C, PH, PW, CHANNELS_LAST, WIDE, VALUES
            )
            more = load_values(p_images, o_patch, m_pred, first, o, m, inverse, E) - pivot
            target = (more - mean[:, None]) * scale[:, None]
            total += _write_residual(p_pred, p_out, target, factor, first, o_pred, o_out, m_i, m_pred, s_pe, E, VALUES)
    if p_sums is not None:
        tl.store(p_sums + pid, tl.sum(total))
    if p_counts is not None:
        tl.store(p_counts + pid, tl.sum(count))


@triton.jit
def loss_and_scale_kernel(
    p_sums, p_counts, p_loss, p_scale,
    num_sums, count,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = sum / (count * E); scale = 2 / (count * E), the factor from the residual to the gradient."""
    i = tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_sums, BLOCK):
        total += tl.load(p_sums + first + i, mask=first + i < num_sums, other=0)
        if p_counts is not None:
            counts += tl.load(p_counts + first + i, mask=first + i < num_sums, other=0).to(tl.int64)
    values = tl.full([], count, tl.int64) * E
    if p_counts is not None:
        values = tl.maximum(tl.sum(counts), 1) * E
    tl.store(p_loss, tl.sum(total) / values.to(tl.float32))
    tl.store(p_scale, 2 / values.to(tl.float32))


@triton.jit
def masked_mse_backward_kernel(
    p_grad, p_residual, p_scale, p_out,
    num_values,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = grad * scale * residual."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    factor = tl.load(p_grad).to(tl.float32) * tl.load(p_scale)
    residual = tl.load(p_residual + i, mask=i < num_values, other=0).to(tl.float32)
    tl.store(p_out + i, rounded(factor * residual, p_out.dtype.element_ty), mask=i < num_values)


def loss_tiles(num_patches: int, channels: int, patch: list[int]) -> LossTiles:
    """A warp for up to 1024 values; several turns, so that decoding the values costs a patch little.

    From the inspector for sm_90, not raced on a GPU: a patch of 3 x 16 x 16 takes one warp 610 to 700 instructions,
    without a barrier, in 80 registers, or 128 where pixels are normalised; two warps take 890 to 1000.
    Blocks of 8192 values spill; patches of more than 4096 are read three times.
    """
    values = min(next_power_of_2(channels * prod(patch)), 4096)
    patches = max(1, 512 // values)
    turns = min(max(num_patches // (4096 * patches), 1), 8)
    return LossTiles(patches, values, turns, num_warps=1 if values <= 1024 else values // 512)


def backward_tiles() -> BlockTiles:
    return BlockTiles(values=4096, num_warps=8)  # two 128-bit loads a thread in bfloat16


def masked_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor | None,
    ids_mask: Tensor | None,
    patch: list[int],
    norm_pix: bool,
    mean: Tensor | None,
    std: Tensor | None,
    eps: float,
    layout: str,
    keep_residual: bool,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    # In place a kept residual takes the memory of a contiguous pred.
    residual = pred if keep_residual and in_place else pred.new_empty(pred.shape if keep_residual else 0)
    sums, counts = _residuals(
        pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, out=residual if keep_residual else None
    )
    loss, scale = (pred.new_empty((), dtype=torch.float32) for _ in range(2))
    programs, (n, rows, values) = len(sums), pred.shape
    loss_and_scale_kernel[(1,)](
        sums, counts, loss, scale, programs, n * rows,
        E=values, BLOCK=min(max(next_power_of_2(programs), 16), 4096), num_warps=8,
    )  # fmt: skip
    return loss, residual, scale


def masked_mse_recomputed_backward(pred: Tensor, *args) -> Tensor:
    *inputs, grad, scale = args  # those of masked_mse, and what its backward got
    out = pred.new_empty(pred.shape)
    _residuals(pred, *inputs, grad, scale, out)
    return out


def _residuals(
    pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, grad=None, scale=None, out=None
):  # fmt: skip
    # Launches the kernel: partial sums and counts of the loss, or, where grad and scale are given, the gradient alone.
    mean, std = (x if x is None else x.contiguous() for x in (mean, std))  # read without strides
    (n, rows, values), channels, (ph, pw) = pred.shape, images.shape[1], patch
    s_pn, s_pl, s_pe = pred.stride()
    unit = gcd(values, s_pn, s_pl)  # known to the compiler, so that rows of any multiple of 4 values are read widely
    s_xn, s_xc, s_xh, s_xw = images.stride()
    last = (channels - 1) * s_xc + (ph - 1) * s_xh + (pw - 1) * s_xw  # pixel of a patch
    grid = patch_grid(images, patch)
    tiles = loss_tiles(n * rows, channels, patch)
    programs = cdiv(n * rows, tiles.patches * tiles.turns)
    sums = pred.new_empty(programs, dtype=torch.float32) if grad is None else None
    counts = pred.new_empty(programs, dtype=torch.int32) if grad is None and mask is not None else None
    masked_mse_kernel[(programs,)](
        pred, images, mean, std, mask, ids_mask, grad, scale, out, sums, counts,
        n * rows, rows, prod(grid), grid[1], tiles.turns, eps,
        s_pn // unit, s_pl // unit, s_pe, s_xn, s_xc, s_xh, s_xw, *(ids_mask if mask is None else mask).stride(),
        C=channels, PH=ph, PW=pw, NORM_PIX=norm_pix, CHANNELS_LAST=layout == "channels_last", WIDE=last >= 2**31, UNIT=unit,
        BLOCK=tiles.patches, VALUES=tiles.values, num_warps=tiles.num_warps,
    )  # fmt: skip
    return sums, counts


def masked_mse_backward(residual: Tensor, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    residual = residual.contiguous()  # read without strides
    out = residual.new_empty(residual.shape, dtype=dtype)
    tiles, values = backward_tiles(), residual.numel()
    masked_mse_backward_kernel[(cdiv(values, tiles.values),)](
        grad, residual, scale, out, values, BLOCK=tiles.values, num_warps=tiles.num_warps
    )
    return out
