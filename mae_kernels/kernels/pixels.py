"""Patches read straight from the images: no copy of a patch is ever made in memory."""

import triton
import triton.language as tl

from mae_kernels.kernels.numerics import rounded


@triton.jit
def patch_offsets(ids, grid_width, s_h, s_w, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of the first pixel of each patch: ``(id // grid_width) * PH * s_h + (id % grid_width) * PW * s_w``."""
    ids = ids.to(tl.int32)  # 64-bit divisions are many times slower
    return (ids // grid_width * PH).to(tl.int64) * s_h + (ids % grid_width * PW).to(tl.int64) * s_w


@triton.jit
def load_patches(
    p_images, p_mean, p_std, o_patch, m_patch, rows, s_c, s_h, s_w,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(x - mean[c]) / std[c]`` of rows of patches, uint8 read as ``x / 255``, zero outside: [B, R, COLS] in DTYPE.

    Row ``c * PH + p`` of a patch is row p of its channel c, PW pixels wide.
    """
    c = rows // PH
    cols = tl.arange(0, COLS)
    m_row = rows < C * PH
    o_row = c.to(tl.int64) * s_c + (rows % PH).to(tl.int64) * s_h  # [R]
    m_pixel = m_patch[:, None, None] & m_row[None, :, None] & (cols < PW)[None, None, :]
    o_pixel = o_patch[:, None, None] + o_row[None, :, None] + (cols.to(tl.int64) * s_w)[None, None, :]
    x = tl.load(p_images + o_pixel, mask=m_pixel, other=0)  # [B, R, COLS]
    if x.dtype == tl.uint8:
        x = x.to(tl.float32) * (1 / 255)
    if p_mean is not None:
        # The division is one for a row of pixels, not one for each.
        mean = tl.load(p_mean + c, mask=m_row, other=0).to(tl.float32)
        inverse = 1 / tl.load(p_std + c, mask=m_row, other=1).to(tl.float32)  # [R]
        x = tl.where(m_pixel, (x.to(tl.float32) - mean[None, :, None]) * inverse[None, :, None], 0)
    return rounded(x, DTYPE)
