"""Patches read straight from the images ``[N, C, T, H, W]``."""

import triton
import triton.language as tl


@triton.jit
def patch_offsets(
    ids, grid_h, grid_w, s_t, s_h, s_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Offset of the first pixel of each patch of a grid ``[T / PT, grid_h, grid_w]``."""
    ids = ids.to(tl.int32)  # 64-bit divisions are many times slower
    t, h, w = ids // grid_w // grid_h, ids // grid_w % grid_h, ids % grid_w
    return (t * PT).to(tl.int64) * s_t + (h * PH).to(tl.int64) * s_h + (w * PW).to(tl.int64) * s_w


@triton.jit
def decoded_values(
    p_statistics, first, num_channels, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of a patch's values from the first on, [VALUES]: offset of the pixel, mean and 1 / std of its channel.

    The values are ordered by frame, row, column and channel (CHANNELS_LAST) or by channel, frame, row and column.
    """
    e = first + tl.arange(0, VALUES)
    if CHANNELS_LAST:
        c, row, q = e % C, e // (PW * C), e // C % PW
    else:
        c, row, q = e // (PT * PH * PW), e // PW % (PT * PH), e % PW
    o_e = c.to(tl.int64) * s_c + (row // PH).to(tl.int64) * s_t + (row % PH).to(tl.int64) * s_h + q.to(tl.int64) * s_w
    if not WIDE:
        # Offsets of 32 bits take half the registers.
        o_e = o_e.to(tl.int32)
    mean, inverse = tl.zeros([VALUES], tl.float32), tl.full([VALUES], 1, tl.float32)
    if p_statistics is not None:
        m_e = e < C * PT * PH * PW
        mean = tl.load(p_statistics + c, mask=m_e, other=0).to(tl.float32)
        inverse = 1 / tl.load(p_statistics + num_channels + c, mask=m_e, other=1).to(tl.float32)
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
