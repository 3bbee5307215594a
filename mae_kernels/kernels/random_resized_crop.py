"""Crop, resize and flip in one launch: each program resizes a tile of one channel of one output image."""

import triton
import triton.language as tl
from torch import Tensor

from mae_kernels.kernels.host import cdiv
from mae_kernels.kernels.tiles import CropTiles


@triton.jit
def cubic(x):
    """Keys' convolution kernel with a = -0.5."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def weights(source, center, inverse, length):
    """Weight of the pixels at source for an output centred at center, not normalised; zero outside 0 to length - 1."""
    inside = (source >= 0) & (source < length)
    return tl.where(inside, cubic((source.to(tl.float32) + 0.5 - center) * inverse), 0.0)


@triton.jit
def clamped(place, length, whole):
    # A box that reaches outside its image, which only the CPU refuses, becomes its part inside, or an edge of it.
    place = tl.minimum(tl.maximum(place, 0), whole - 1)
    return place.to(tl.int32), tl.minimum(tl.maximum(length, 1), whole - place).to(tl.int32)


@triton.jit
def random_resized_crop_kernel(
    p_images, p_starts, p_sizes, p_boxes, p_flips, p_out,
    height, width, num_pixels, channels, out_height, out_width,
    s_xn, s_xc, s_xh, s_xw, s_tn, s_zn, s_zk, s_bn, s_bk, s_fn,
    ROWS: tl.constexpr, COLS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """out[n, c] = flip(weights_y @ box(images[n, c]) @ weights_x), rounded to uint8; weights normalised to a sum of 1.

    The sum over x has a tap for every pixel under the filter, the one over y is a product with a banded matrix. An
    input row is resized once for all ROWS that it adds to: per output pixel of a box s times as large on each side,
    s >= 1, (s + 4 s / ROWS) (4 s + 1) loads and products of taps, about 13 at s = 1.5, and s ROWS + 4 s products
    of the matrix.
    """
    blocks_x, blocks_y = tl.cdiv(out_width, COLS), tl.cdiv(out_height, ROWS)
    pid = tl.program_id(0)
    image = pid // blocks_x // blocks_y
    n, c = (image // channels).to(tl.int64), (image % channels).to(tl.int64)
    y = pid // blocks_x % blocks_y * ROWS + tl.arange(0, ROWS)  # [ROWS]
    x = pid % blocks_x * COLS + tl.arange(0, COLS)  # [COLS]

    o_image = c * s_xc
    if p_sizes is not None:
        start = tl.load(p_starts + n * s_tn)
        height, width = tl.load(p_sizes + n * s_zn), tl.load(p_sizes + n * s_zn + s_zk)
        # Images that reach outside the buffer are never read: they come out black.
        is_image = (height > 0) & (width > 0) & (height < 2**31) & (width < 2**31)
        height, width = tl.where(is_image, height, 1), tl.where(is_image, width, 1)
        is_image = is_image & (start >= 0) & (start <= num_pixels - height * width)
        o_image += start * s_xw
        s_xh = width * s_xw
    else:
        is_image = n >= 0
        o_image += n * s_xn
    top, box_height = clamped(tl.load(p_boxes + n * s_bn), tl.load(p_boxes + n * s_bn + 2 * s_bk), height)
    left, box_width = clamped(tl.load(p_boxes + n * s_bn + s_bk), tl.load(p_boxes + n * s_bn + 3 * s_bk), width)

    # Rounded division: a box of the output's own size is copied.
    scale = tl.div_rn(box_width.to(tl.float32), tl.cast(out_width, tl.float32))
    stretch = tl.maximum(scale, 1.0)
    inverse_x = 1 / stretch
    column = tl.minimum(x, out_width - 1)  # those behind the last one are computed and not stored
    column = tl.where(tl.load(p_flips + n * s_fn), out_width - 1 - column, column)
    center_x = (column.to(tl.float32) + 0.5) * scale  # [COLS]
    first_x = tl.maximum((center_x - 2 * stretch + 0.5).to(tl.int32), 0)
    taps = (4 * stretch).to(tl.int32) + 1
    sum_x = tl.zeros([COLS], tl.float32)
    for k in range(taps):
        sum_x += weights(first_x + k, center_x, inverse_x, box_width)

    scale = tl.div_rn(box_height.to(tl.float32), tl.cast(out_height, tl.float32))
    stretch = tl.maximum(scale, 1.0)
    inverse_y = 1 / stretch
    center_y = (tl.minimum(y, out_height - 1).to(tl.float32) + 0.5) * scale  # [ROWS]
    begin = tl.maximum((tl.min(center_y) - 2 * stretch + 0.5).to(tl.int32), 0)
    end = tl.minimum((tl.max(center_y) + 2 * stretch + 0.5).to(tl.int32), box_height)
    sum_y = tl.zeros([ROWS], tl.float32)

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for line in range(begin, end, LINES):
        source_y = line + tl.arange(0, LINES)  # [LINES]
        m_y = (source_y < end) & is_image
        o_line = o_image + (top + source_y).to(tl.int64) * s_xh
        lines = tl.zeros([LINES, COLS], tl.float32)
        for k in range(taps):
            tap = first_x + k  # [COLS]
            o_tap = (left + tap).to(tl.int64) * s_xw
            m_tap = m_y[:, None] & ((tap < box_width) & (x < out_width))[None, :]
            pixels = tl.load(p_images + o_line[:, None] + o_tap[None, :], mask=m_tap, other=0)  # [LINES, COLS]
            lines += pixels.to(tl.float32) * weights(tap, center_x, inverse_x, box_width)[None, :]
        weights_y = weights(source_y[None, :], center_y[:, None], inverse_y, box_height)  # [ROWS, LINES]
        sum_y += tl.sum(weights_y, axis=1)
        acc = tl.dot(weights_y, lines, acc, input_precision="ieee")

    value = tl.div_rn(acc, sum_y[:, None] * sum_x[None, :])
    # Added to this number, what is behind the point is rounded away, ties to even.
    value = tl.minimum(tl.maximum(value, 0.0), 255.0) + 12582912.0 - 12582912.0
    o_out = (image.to(tl.int64) * out_height + y)[:, None] * out_width + x[None, :]
    tl.store(p_out + o_out, value.to(tl.uint8), mask=(y < out_height)[:, None] & (x < out_width)[None, :])


def crop_tiles() -> CropTiles:
    # These won a race on an H200 in which four taps were loaded at a time (benchmarks/NOTES.md, "On a GPU"). One tap at
    # a time, as here, was not raced.
    return CropTiles(rows=16, cols=32, lines=16, num_warps=2)


def random_resized_crop(
    images: Tensor, starts: Tensor | None, sizes: Tensor | None, boxes: Tensor, flips: Tensor, size: list[int]
) -> Tensor:
    n, (out_height, out_width) = boxes.shape[0], size
    if sizes is None:
        channels, height, width = images.shape[1:]
        num_pixels, strides = 0, (*images.stride(), 0, 0, 0)
    else:
        channels, num_pixels = images.shape
        height, width = 0, 0
        strides = (0, images.stride(0), 0, images.stride(1), *starts.stride(), *sizes.stride())
    tiles = crop_tiles()
    out = images.new_empty((n, channels, out_height, out_width))
    blocks = cdiv(out_height, tiles.rows) * cdiv(out_width, tiles.cols)
    random_resized_crop_kernel[(n * channels * blocks,)](
        images, starts, sizes, boxes, flips, out,
        height, width, num_pixels, channels, out_height, out_width,
        *strides, *boxes.stride(), *flips.stride(),
        ROWS=tiles.rows, COLS=tiles.cols, LINES=tiles.lines, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out
