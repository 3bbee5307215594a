"""The loss: targets are read from the images into registers, and at most their difference from pred is written."""

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masked_mse import Target
from .host import cdiv, next_power_of_2
from .numerics import rounded
from .pixels import decoded_values, load_values, patch_offsets
from .tiles import BlockTiles, LossTiles


@triton.jit
def _write_residual(
    p_pred, p_out, target, factor, first, o_pred, o_out, m_row, m_pred, s_pe,
    E: tl.constexpr, STEP: tl.constexpr, ADJACENT: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    # Sum of (pred - target)^2 over every STEP-th value [B]; what is written is zero where m_pred is not set.
    m_e = (first + tl.arange(0, VALUES) < E)[None, :]
    e = (first + tl.arange(0, VALUES)) * STEP
    m_value = m_pred[:, None] & m_e
    o_pred = tl.max_contiguous(o_pred[:, None] + (e.to(tl.int64) * s_pe)[None, :], [1, ADJACENT])
    pred = tl.load(p_pred + o_pred, mask=m_value, other=0)
    residual = tl.where(m_value, pred.to(tl.float32) - target, 0)  # [B, VALUES]
    if p_out is not None:
        out = rounded(residual * factor, p_out.dtype.element_ty)
        o_out = tl.max_contiguous(o_out[:, None] + e[None, :], [1, ADJACENT])
        tl.store(p_out + o_out, out, mask=m_row[:, None] & m_e)
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
    p_pred, p_images, p_statistics, p_selected, p_grad, p_scale, p_out, p_sums, p_counts,
    num_rows, rows_per_sample, num_patches, grid_h, grid_w, blocks_per_program, eps_of_variance, eps_of_deviation,
    s_pn, s_pl, s_pe, s_xn, s_xc, s_xt, s_xh, s_xw, s_in, s_il,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, GROUPS: tl.constexpr,
    NORM_PIX: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    ADJACENT: tl.constexpr, BLOCK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """residual = pred - target on masked patches; partial sums of residual^2, and of the patches.

    out = residual, or its product with grad * scale where these are given: the gradient of pred. The channels of an
    image make GROUPS groups of C, normalised each by itself: to a program the patches of one group are all there are.
    """
    E: tl.constexpr = C * PT * PH * PW
    STEP: tl.constexpr = GROUPS if CHANNELS_LAST else 1
    pid = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    p_images += group.to(tl.int64) * C * s_xc
    first_value = group if CHANNELS_LAST else group * E
    if p_statistics is not None:
        p_statistics += group * C
    factor = 1.0
    if p_grad is not None:
        factor = tl.load(p_grad).to(tl.float32) * tl.load(p_scale)
    # All patches share these. The compiler does not move loads out of a loop that stores.
    o_pivot, mean_pivot, inverse_pivot = decoded_values(
        p_statistics, 0, C * GROUPS, s_xc, s_xt, s_xh, s_xw, C, PT, PH, PW, CHANNELS_LAST, WIDE, 1
    )
    o_e, mean_e, inverse_e = decoded_values(
        p_statistics, 0, C * GROUPS, s_xc, s_xt, s_xh, s_xw, C, PT, PH, PW, CHANNELS_LAST, WIDE, VALUES
    )
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for turn in range(blocks_per_program):
        i = (pid * blocks_per_program + turn) * BLOCK + tl.arange(0, BLOCK)  # [B], row n * rows_per_sample + j
        m_i = i < num_rows
        n = (i // rows_per_sample).to(tl.int64)
        j = (i % rows_per_sample).to(tl.int64)
        selected = tl.load(p_selected + n * s_in + j * s_il, mask=m_i, other=0)
        if p_selected.dtype.element_ty == tl.int64:
            patch = selected
            m_pred = m_i & (patch >= 0) & (patch < num_patches)
        else:
            patch = j
            m_pred = m_i & (selected != 0)
        count += m_pred.to(tl.int32)
        o_patch = n * s_xn + patch_offsets(patch, grid_h, grid_w, s_xt, s_xh, s_xw, PT, PH, PW)
        o_pred = (n * s_pn + j * s_pl) * UNIT + first_value * s_pe
        o_out = i.to(tl.int64) * (E * GROUPS) + first_value

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
                        p_statistics, first, C * GROUPS, s_xc, s_xt, s_xh, s_xw, C, PT, PH, PW,
                        CHANNELS_LAST, WIDE, VALUES,
                    )  # fmt: skip
                    more = load_values(p_images, o_patch, m_pred, first, o, m, inverse, E) - pivot
                    moment += _moment(more, mean, first, power, E, VALUES)
                if power == 1:
                    mean = moment / E
                else:
                    scale = 1 / (tl.sqrt_rn(moment / (E - 1) + eps_of_variance) + eps_of_deviation)
        target = (x - mean[:, None]) * scale[:, None]
        total += _write_residual(
            p_pred, p_out, target, factor, 0, o_pred, o_out, m_i, m_pred, s_pe, E, STEP, ADJACENT, VALUES
        )
        for first in range(VALUES, E, VALUES):
            o, m, inverse = decoded_values(
                p_statistics, first, C * GROUPS, s_xc, s_xt, s_xh, s_xw, C, PT, PH, PW, CHANNELS_LAST, WIDE, VALUES
            )
            more = load_values(p_images, o_patch, m_pred, first, o, m, inverse, E) - pivot
            target = (more - mean[:, None]) * scale[:, None]
            total += _write_residual(
                p_pred, p_out, target, factor, first, o_pred, o_out, m_i, m_pred, s_pe, E, STEP, ADJACENT, VALUES
            )
    if p_sums is not None:
        tl.store(p_sums + tl.program_id(0), tl.sum(total))
        tl.store(p_counts + tl.program_id(0), tl.sum(count))


@triton.jit
def loss_and_scale_kernel(
    p_sums, p_counts, p_loss, p_scale,
    num_sums,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = sum / (count * E); scale = 2 / (count * E), the factor from the residual to the gradient."""
    i = tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_sums, BLOCK):
        total += tl.load(p_sums + first + i, mask=first + i < num_sums, other=0)
        counts += tl.load(p_counts + first + i, mask=first + i < num_sums, other=0).to(tl.int64)
    values = (tl.maximum(tl.sum(counts), 1) * E).to(tl.float32)
    tl.store(p_loss, tl.sum(total) / values)
    tl.store(p_scale, 2 / values)


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


def loss_tiles(num_patches: int, patch_values: int, interleaved: bool) -> LossTiles:
    """A warp for up to 1024 values; several turns, so that decoding the values costs a patch little.

    From the inspector for sm_90, not raced on a GPU: a patch of 3 x 16 x 16 takes one warp 610 to 700 instructions,
    without a barrier, in 80 registers, or 128 where pixels are normalised; two warps take 890 to 1000.
    Blocks of 8192 values spill; patches of more than 4096 are read three times.

    Where channels are interleaved, a load of pixels by threads that take eight adjacent values, as wide a load of
    bfloat16 predictions, touches 16 cache lines; with two it touches 7, for 12 instructions more a patch. On an H200
    the former waited for the L1 cache 45 % of the time (benchmarks/NOTES.md, "On a GPU"); two were not run.
    """
    values = min(next_power_of_2(patch_values), 4096)
    patches = max(1, 512 // values)
    turns = min(max(num_patches // (4096 * patches), 1), 8)
    return LossTiles(patches, values, turns, 2 if interleaved else values, 1 if values <= 1024 else values // 512)


def backward_tiles() -> BlockTiles:
    return BlockTiles(values=4096, num_warps=8)  # two 128-bit loads a thread in bfloat16


def masked_mse(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, keep_residual: bool, *target: Any
) -> tuple[Tensor, Tensor, Tensor]:
    residual = pred.new_empty(pred.shape if keep_residual else 0)
    out = residual if keep_residual else None
    sums, counts, values = _residuals(pred, images, selected, statistics, None, None, out, Target(*target))
    loss, scale = (pred.new_empty((), dtype=torch.float32) for _ in range(2))
    loss_and_scale_kernel[(1,)](
        sums, counts, loss, scale, len(sums),
        E=values, BLOCK=min(max(next_power_of_2(len(sums)), 16), 4096), num_warps=8,
    )  # fmt: skip
    return loss, residual, scale


def masked_mse_recomputed_backward(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, grad: Tensor, scale: Tensor, *target: Any
) -> Tensor:
    out = pred.new_empty(pred.shape)
    _residuals(pred, images, selected, statistics, grad, scale, out, Target(*target))
    return out


def _residuals(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, grad: Tensor | None,
    scale: Tensor | None, out: Tensor | None, target: Target,
) -> tuple[Any, Any, int]:  # fmt: skip
    # Launches the kernel: partial sums and counts of the loss, or, where grad and scale are given, the gradient alone.
    statistics = None if statistics is None else statistics.contiguous()  # read without strides
    (n, rows, values), grid = pred.shape, target.grid(images)
    (pt, ph, pw), (_, grid_h, grid_w) = grid.patch, grid.grid
    groups = target.groups(grid.channels)
    s_pn, s_pl, s_pe = pred.stride()
    unit = gcd(values, s_pn, s_pl)  # known to the compiler, so that rows of any multiple of 4 values are read widely
    strides = images.stride()
    sides = (grid.channels, *grid.patch)
    last = sum((side - 1) * stride for side, stride in zip(sides, strides[1:], strict=True))  # pixel of a patch
    channels_last = target.layout == "channels_last"
    tiles = loss_tiles(n * rows, values // groups, channels_last and grid.channels > 1)
    adjacent = tiles.adjacent if s_pe == 1 and not (channels_last and groups > 1) else 1  # of those side by side
    programs = cdiv(n * rows, tiles.patches * tiles.turns) * groups
    sums = pred.new_empty(programs, dtype=torch.float32) if grad is None else None
    counts = pred.new_empty(programs, dtype=torch.int32) if grad is None else None
    masked_mse_kernel[(programs,)](
        pred, images, statistics, selected, grad, scale, out, sums, counts,
        n * rows, rows, grid.num_patches, grid_h, grid_w, tiles.turns, *target.eps_of_variance_and_deviation,
        s_pn // unit, s_pl // unit, s_pe, *strides, *selected.stride(),
        C=grid.channels // groups, PT=pt, PH=ph, PW=pw, GROUPS=groups,
        NORM_PIX=target.norm_pix != "none", CHANNELS_LAST=channels_last, WIDE=last >= 2**31,
        UNIT=unit, ADJACENT=adjacent, BLOCK=tiles.patches, VALUES=tiles.values, num_warps=tiles.num_warps,
    )  # fmt: skip
    return sums, counts, values // groups


def masked_mse_backward(residual: Tensor, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    residual = residual.contiguous()  # read without strides
    out = residual.new_empty(residual.shape, dtype=dtype)
    tiles, values = backward_tiles(), residual.numel()
    masked_mse_backward_kernel[(cdiv(values, tiles.values),)](
        grad, residual, scale, out, values, BLOCK=tiles.values, num_warps=tiles.num_warps
    )
    return out
