"""Patches read straight from the images."""

import triton
import triton.language as tl


@triton.jit
def patch_offsets(ids, grid_width, s_h, s_w, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of the first pixel of each patch: ``(id // grid_width) * PH * s_h + (id % grid_width) * PW * s_w``."""
    ids = ids.to(tl.int32)  # 64-bit divisions are many times slower
    return (ids // grid_width * PH).to(tl.int64) * s_h + (ids % grid_width * PW).to(tl.int64) * s_w


@triton.jit
def decoded_values(
    p_mean, p_std, first, s_c, s_h, s_w,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of a patch's values from the first on, [VALUES]: offset of the pixel, mean and 1 / std of its channel.

    The values are ordered by row, column and channel (CHANNELS_LAST) or by channel, row and column.
    """
    e = first + tl.arange(0, VALUES)
    if CHANNELS_LAST:
        c, p, q = e % C, e // (PW * C), e // C % PW
    else:
        c, p, q = e // (PH * PW), e // PW % PH, e % PW
    o_e = c.to(tl.int64) * s_c + p.to(tl.int64) * s_h + q.to(tl.int64) * s_w
    if not WIDE:
        # Offsets of 32 bits take half the registers.
        o_e = o_e.to(tl.int32)
    mean, inverse = tl.zeros([VALUES], tl.float32), tl.full([VALUES], 1, tl.float32)
    if p_mean is not None:
        m_e = e < C * PH * PW
        mean = tl.load(p_mean + c, mask=m_e, other=0).to(tl.float32)
        inverse = 1 / tl.load(p_std + c, mask=m_e, other=1).to(tl.float32)
    return o_e, mean, inverse


@triton.jit
def load_values(p_images, o_patch, m_patch, first, o_e, mean, inverse, E: tl.constexpr):
    """``(x - mean[c]) / std[c]`` of the values of patches [B], uint8 read as ``x / 255``: [B, VALUES] in float32.

    What lies outside of the patches is read as zero.
    """
    m_e = first + tl.arange(0, o_e.shape[0]) < E
    x = tl.load(p_images + o_patch[:, None] + o_e[None, :], mask=m_patch[:, None] & m_e[None, :], other=0)
    if x.dtype == tl.uint8:
        x = x.to(tl.float32) * (1 / 255)
    return (x.to(tl.float32) - mean[None, :]) * inverse[None, :]
