"""Crop, resize and flip in one launch: each program resizes a tile of one channel of one output image."""

import triton
import triton.language as tl
from torch import Tensor

from .host import cdiv, next_power_of_2
from .tiles import CropTiles


@triton.jit
def cubic(x):
    """Keys' convolution kernel with a = -0.5."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def weights(source, center, inverse, length):
    """Weight of the pixels at source for an output centred at center, 128 in sum; zero outside 0 to length - 1."""
    inside = (source >= 0) & (source < length)
    # With a sum of 1 the lower halves would be subnormal numbers, which some chips take for zero.
    return tl.where(inside, cubic((source.to(tl.float32) + 0.5 - center) * inverse) * (inverse * 128), 0.0)


@triton.jit
def halves(x):
    """x as a sum of two float16 numbers, which hold 22 of its bits."""
    upper = x.to(tl.float16)
    return upper, (x - upper.to(tl.float32)).to(tl.float16)


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
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr, SPAN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out[n, c] = flip(weights_y @ box(images[n, c]) @ weights_x), rounded to uint8; weights normalised to a sum of 1.

    Both products are those of tensor cores, with banded matrices of which only the band is made: once for all channels.
    Pixels are exact in float16; weights, and what the first product leaves, take two float16 numbers each.
    """
    blocks_x, blocks_y = tl.cdiv(out_width, COLS), tl.cdiv(out_height, ROWS)
    pid = tl.program_id(0)
    groups = tl.cdiv(channels, CHANNELS)
    n = (pid // blocks_x // blocks_y // groups).to(tl.int64)
    first_channel = (pid // blocks_x // blocks_y % groups) * CHANNELS
    first_row = pid // blocks_x % blocks_y * ROWS
    y = first_row + tl.arange(0, ROWS)  # [ROWS]
    x = pid % blocks_x * COLS + tl.arange(0, COLS)  # [COLS]

    o_image = n * s_xn
    is_image = n >= 0
    if p_sizes is not None:
        start = tl.load(p_starts + n * s_tn)
        height, width = tl.load(p_sizes + n * s_zn), tl.load(p_sizes + n * s_zn + s_zk)
        # Of images that reach outside the buffer its first pixel is read alone: they come out black.
        is_image = (height > 0) & (width > 0) & (height < 2**31) & (width < 2**31)
        height, width = tl.where(is_image, height, 1), tl.where(is_image, width, 1)
        is_image = is_image & (start >= 0) & (start <= num_pixels - height * width)
        height, width = tl.where(is_image, height, 1), tl.where(is_image, width, 1)
        o_image = tl.where(is_image, start, 0) * s_xw
        s_xh = width * s_xw
    top, box_height = clamped(tl.load(p_boxes + n * s_bn), tl.load(p_boxes + n * s_bn + 2 * s_bk), height)
    left, box_width = clamped(tl.load(p_boxes + n * s_bn + s_bk), tl.load(p_boxes + n * s_bn + 3 * s_bk), width)
    p_images += o_image + top.to(tl.int64) * s_xh + left.to(tl.int64) * s_xw

    # Rounded division: a box of the output's own size is copied.
    scale = tl.div_rn(box_width.to(tl.float32), tl.cast(out_width, tl.float32))
    stretch = tl.maximum(scale, 1.0)
    inverse_x = 1 / stretch
    column = tl.minimum(x, out_width - 1)  # those behind the last one are computed and not stored
    column = tl.where(tl.load(p_flips + n * s_fn), out_width - 1 - column, column)
    center_x = (column.to(tl.float32) + 0.5) * scale  # [COLS]
    begin_x = tl.maximum((tl.min(center_x) - 2 * stretch + 0.5).to(tl.int32), 0)
    end_x = tl.minimum((tl.max(center_x) + 2 * stretch + 0.5).to(tl.int32), box_width)

    scale = tl.div_rn(box_height.to(tl.float32), tl.cast(out_height, tl.float32))
    stretch = tl.maximum(scale, 1.0)
    inverse_y = 1 / stretch
    center_y = (tl.minimum(y, out_height - 1).to(tl.float32) + 0.5) * scale  # [ROWS]
    begin_y = tl.maximum((tl.min(center_y) - 2 * stretch + 0.5).to(tl.int32), 0)
    end_y = tl.minimum((tl.max(center_y) + 2 * stretch + 0.5).to(tl.int32), box_height)

    # Offsets of 32 bits take half the registers and instructions.
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    s_xc, s_xh, s_xw = tl.cast(s_xc, OFFSET), tl.cast(s_xh, OFFSET), tl.cast(s_xw, OFFSET)
    # Where a filter is zero any pixel will do: places outside the box become its edge, which is cheaper than a mask.
    o_channel = tl.minimum(first_channel + tl.arange(0, CHANNELS), channels - 1) * s_xc  # [CHANNELS]
    acc = tl.zeros([ROWS * CHANNELS, COLS], tl.float32)
    sum_x = tl.zeros([SPAN, COLS], tl.float32)
    sum_y = tl.zeros([ROWS, LINES], tl.float32)
    for first_x in range(begin_x, end_x, SPAN):
        source_x = first_x + tl.arange(0, SPAN)  # [SPAN]
        weights_x = weights(source_x[:, None], center_x[None, :], inverse_x, box_width)  # [SPAN, COLS]
        sum_x += weights_x
        o_place = o_channel[:, None] + (tl.minimum(source_x, box_width - 1) * s_xw)[None, :]  # [CHANNELS, SPAN]
        narrow = tl.zeros([ROWS, CHANNELS * SPAN], tl.float32)
        for first_y in range(begin_y, end_y, LINES):
            source_y = first_y + tl.arange(0, LINES)  # [LINES]
            weights_y = weights(source_y[None, :], center_y[:, None], inverse_y, box_height)  # [ROWS, LINES]
            sum_y += tl.where(first_x == begin_x, weights_y, 0)
            o_line = tl.minimum(source_y, box_height - 1) * s_xh
            pixels = tl.load(p_images + (o_line[:, None, None] + o_place[None, :, :]))  # [LINES, CHANNELS, SPAN]
            pixels = tl.reshape(pixels.to(tl.float16), [LINES, CHANNELS * SPAN])
            upper, lower = halves(weights_y)
            narrow = tl.dot(lower, pixels, tl.dot(upper, pixels, narrow))
        upper_x, lower_x = halves(weights_x)
        upper, lower = halves(tl.reshape(narrow, [ROWS * CHANNELS, SPAN]))
        acc = tl.dot(upper, lower_x, tl.dot(lower, upper_x, tl.dot(upper, upper_x, acc)))

    row = tl.arange(0, ROWS * CHANNELS)  # row y of the tile * CHANNELS + channel
    factor_y = tl.where(is_image, 1 / tl.sum(sum_y, axis=1), 0)  # [ROWS]
    factor_y = tl.reshape(tl.broadcast_to(factor_y[:, None], [ROWS, CHANNELS]), [ROWS * CHANNELS])
    value = acc * (1 / tl.sum(sum_x, axis=0))[None, :] * factor_y[:, None]
    # Added to this number, a value is rounded, ties to even, and stands in the last bits.
    value = (tl.minimum(tl.maximum(value, 0.0), 255.0) + 12582912.0).to(tl.int32, bitcast=True)
    y = first_row + row // CHANNELS
    c = first_channel + row % CHANNELS
    o_out = ((n * channels + c) * out_height + y)[:, None] * out_width + x[None, :]
    m_out = ((c < channels) & (y < out_height))[:, None] & (x < out_width)[None, :]
    tl.store(p_out + o_out, value.to(tl.uint8), mask=m_out)


def crop_tiles() -> CropTiles:
    # Of those that the inspector compiled for sm_90 the fewest instructions at 12 warps a multiprocessor, 145 for each
    # value of an output from a box 1.5 times as large. Not raced on a GPU.
    return CropTiles(rows=32, cols=32, lines=16, span=32, num_warps=4)


def random_resized_crop(
    images: Tensor, starts: Tensor | None, sizes: Tensor | None, boxes: Tensor, flips: Tensor, size: list[int]
) -> Tensor:
    n, (out_height, out_width) = boxes.shape[0], size
    if starts is None or sizes is None:
        channels, height, width = images.shape[1:]
        num_pixels, sides, strides = 0, images.shape[1:], (*images.stride(), 0, 0, 0)
    else:
        channels, num_pixels = images.shape
        height, width, sides = 0, 0, images.shape
        strides = (0, images.stride(0), 0, images.stride(1), *starts.stride(), *sizes.stride())
    last = sum((side - 1) * stride for side, stride in zip(sides, images.stride()[-len(sides) :], strict=True))
    tiles = crop_tiles()
    out = images.new_empty((n, channels, out_height, out_width))
    together = min(next_power_of_2(channels), 4)
    blocks = cdiv(out_height, tiles.rows) * cdiv(out_width, tiles.cols) * cdiv(channels, together)
    random_resized_crop_kernel[(n * blocks,)](
        images, starts, sizes, boxes, flips, out,
        height, width, num_pixels, channels, out_height, out_width,
        *strides, *boxes.stride(), *flips.stride(),
        ROWS=tiles.rows, COLS=tiles.cols, CHANNELS=together, LINES=tiles.lines, SPAN=tiles.span,
        WIDE=last >= 2**31, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out
