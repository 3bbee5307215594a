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
def _load_pixels(
    p_images, p_mean, p_std, o_patch, m_patch, rows, cols, s_c, s_h, s_w,
    AXES: tl.constexpr, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # Pixels (rows, cols) of patches. The rows [R] lack the AXES of the result that the other blocks have.
    c = rows // PH
    m_row = rows < C * PH
    o_row = c.to(tl.int64) * s_c + (rows % PH).to(tl.int64) * s_h  # [R]
    m_pixel = m_patch & tl.expand_dims(m_row, AXES) & (cols < PW)
    o_pixel = o_patch + tl.expand_dims(o_row, AXES) + cols.to(tl.int64) * s_w
    x = tl.load(p_images + o_pixel, mask=m_pixel, other=0)
    if x.dtype == tl.uint8:
        x = x.to(tl.float32) * (1 / 255)
    if p_mean is not None:
        # The division is one for a row, not one for each pixel.
        mean = tl.load(p_mean + c, mask=m_row, other=0).to(tl.float32)
        inverse = 1 / tl.load(p_std + c, mask=m_row, other=1).to(tl.float32)  # [R]
        x = tl.where(m_pixel, (x.to(tl.float32) - tl.expand_dims(mean, AXES)) * tl.expand_dims(inverse, AXES), 0)
    return rounded(x, DTYPE)


@triton.jit
def load_patches(
    p_images, p_mean, p_std, o_patch, m_patch, rows, s_c, s_h, s_w,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(x - mean[c]) / std[c]`` of rows of patches, uint8 read as ``x / 255``, zero outside: [B, R, COLS] in DTYPE.

    Row ``c * PH + p`` of a patch is row p of its channel c, PW pixels wide.
    """
    return _load_pixels(
        p_images, p_mean, p_std, o_patch[:, None, None], m_patch[:, None, None], rows,
        tl.arange(0, COLS)[None, None, :], s_c, s_h, s_w, (0, 2), C, PH, PW, DTYPE,
    )  # fmt: skip


@triton.jit
def load_patch_values(
    p_images, p_mean, p_std, o_patch, m_patch, first, s_c, s_h, s_w,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same of ROWS rows from the first on, one behind the other, as products take them: [B, ROWS * COLS]."""
    if COLS < 8:
        # Triton 3.6 has no shared layout for a reshape of so narrow rows: chips that multiply from there fail.
        value = tl.arange(0, ROWS * COLS)
        x = _load_pixels(
            p_images, p_mean, p_std, o_patch[:, None], m_patch[:, None], first + value // COLS,
            (value % COLS)[None, :], s_c, s_h, s_w, 0, C, PH, PW, DTYPE,
        )  # fmt: skip
    else:
        rows = first + tl.arange(0, ROWS)
        x = load_patches(p_images, p_mean, p_std, o_patch, m_patch, rows, s_c, s_h, s_w, C, PH, PW, COLS, DTYPE)
        x = tl.reshape(x, [o_patch.shape[0], ROWS * COLS])
    return x
