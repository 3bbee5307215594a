"""Random crops of images of any size, resized and flipped as one batch: the published augmentation, on the device."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .registration import register_op

# Outputs of one product. On a CPU 16 and 64 take longer: more calls, or more weights that are zero.
_BLOCK = 32


class PackedImages(NamedTuple):
    """N images of different sizes in one buffer: a batch that is copied to a device at once."""

    pixels: Tensor  # [C, B] uint8, the planes of all images one behind the other
    starts: Tensor  # [N] int64, where in B each image begins
    sizes: Tensor  # [N, 2] int64, height and width; image n takes height * width places, row by row

    @staticmethod
    def pack(images: Sequence[Tensor]) -> "PackedImages":
        """Copy N tensors ``[C, H_n, W_n]`` uint8 of one device into one buffer.

        Raises:
            TypeError, ValueError: see the message.
        """
        op = "PackedImages.pack"
        if len(images) == 0:
            raise ValueError(f"{op}: images is empty")
        for n, image in enumerate(images):
            checks.tensor(op, f"images[{n}]", image, ("C", "H", "W"))
            checks.uint8(op, f"images[{n}]", image)
            checks.not_empty(op, f"images[{n}]", image)
            checks.same_device(op, "images[0]", images[0], **{f"images[{n}]": image})
            if image.shape[0] != images[0].shape[0]:
                raise ValueError(
                    f"{op}: images[{n}] has {image.shape[0]} channels, but images[0] has {images[0].shape[0]}"
                )
        sizes = torch.tensor([image.shape[1:] for image in images], device=images[0].device)
        areas = sizes[:, 0] * sizes[:, 1]
        return PackedImages(torch.cat([image.flatten(1) for image in images], dim=1), areas.cumsum(0) - areas, sizes)


def random_resized_crop(
    images: Tensor | list[Tensor] | tuple[Tensor, ...] | PackedImages,
    boxes: Tensor,
    flips: Tensor,
    size: int | tuple[int, int],
) -> Tensor:
    """Cut a box out of each image, resize it, bicubic and antialiased, and flip it: ``[N, C, h, w]`` uint8.

    ``out[n, c] = flip(weights_y @ box(images[n, c]) @ weights_x)``, rounded once, at the end. No pixel outside its box
    is read: the edge of a box is an edge of the picture. The boxes come from :func:`random_crop_boxes` or elsewhere.

    Args:
        images: uint8, ``[N, C, H, W]`` of any strides, N may be 0; or N tensors ``[C, H_n, W_n]``, which are packed
            first; or :class:`PackedImages`, packed before, as by the workers of a data loader.
        boxes: ``[N, 4]`` int64: top, left, height and width in pixels.
        flips: ``[N]`` bool: True mirrors the result left to right.
        size: ``h = w``, or ``(h, w)``, in pixels.

    Returns:
        ``[N, C, h, w]`` uint8, contiguous, on the device of images. Not differentiable.

    Raises:
        TypeError, ValueError: see the message. That boxes lie inside their images, and packed images inside their
            buffer, is checked on the CPU, elsewhere with ``MAE_KERNELS_DEBUG=1``; the kernel does not read outside
            the images without that either.

    The result is within 1 level of 255 of the equivalent PyTorch below, whose sums are in another order. PyTorch's
    own path for uint8, and Pillow, round and clip between rows and columns too: where the filter overshoots, at sharp
    edges, they are some levels away from both. PyTorch 2.13 errs where the result is one pixel wide.

    Equivalent PyTorch, for each image::

        crop = image[None, :, top : top + height, left : left + width].float()
        crop = F.interpolate(crop, size, mode="bicubic", antialias=True, align_corners=False)
        crop = crop.round().clamp(0, 255).to(torch.uint8)[0]
        out = crop.flip(-1) if flip else crop
    """
    op = "random_resized_crop"
    size = checks.pair(op, "size", size)
    starts = sizes = None
    if isinstance(images, PackedImages):
        images, starts, sizes = images
        checks.tensor(op, "images.pixels", images, ("C", "B"))
        checks.tensor(op, "images.starts", starts, ("N",))
        checks.not_empty(op, "images.starts", starts)
        n = starts.shape[0]
        checks.tensor(op, "images.sizes", sizes, (n, 2))
        checks.int64(op, "images.starts", starts)
        checks.int64(op, "images.sizes", sizes)
    elif isinstance(images, tuple | list):
        images, starts, sizes = PackedImages.pack(images)
        n = starts.shape[0]
    else:
        checks.tensor(op, "images", images, ("N", "C", "H", "W"))
        n = images.shape[0]
    checks.uint8(op, "images", images)
    checks.not_empty(op, "images", images, batch=sizes is None)
    checks.tensor(op, "boxes", boxes, (n, 4))
    checks.int64(op, "boxes", boxes)
    checks.tensor(op, "flips", flips, (n,))
    if flips.dtype != torch.bool:
        raise TypeError(f"{op}: flips must be bool, got {checks.dtype_name(flips)}; call .bool()")
    checks.same_device(op, "images", images, starts=starts, sizes=sizes, boxes=boxes, flips=flips)
    return _random_resized_crop(images, starts, sizes, boxes, flips, size)


def random_crop_boxes(
    sizes: Tensor,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random box in each image, of random area and shape: the published sampling, without a loop.

    Up to ten times an area, uniform in ``scale * H * W``, and a ratio width / height, log-uniform in ``ratio``, are
    drawn and the sides rounded to pixels; the first box that fits gets a place uniform among all that it can have.
    Where none fits, it is the largest central box whose shape is in ``ratio``.

    Args:
        sizes: ``[N, 2]`` int64, positive: height and width of each image in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        generator: random generator, on the device of sizes.

    Returns:
        ``[N, 4]`` int64, as :func:`random_resized_crop` takes them, on the device of sizes. Nothing is read back from
        the device; one ``torch.rand`` is all that is drawn, so that a seed gives the same boxes.

    Raises:
        TypeError, ValueError: see the message.

    Equivalent PyTorch: ``torchvision.transforms.RandomResizedCrop.get_params`` for each image, from another stream of
    random numbers.

    Source: He et al. 2021, appendix A.1: random resized cropping is the only augmentation. The published code has
    ``scale=(0.2, 1.0)`` and flips half of the crops.
    """
    op = "random_crop_boxes"
    checks.tensor(op, "sizes", sizes, ("N", 2))
    checks.int64(op, "sizes", sizes)
    for name, bounds in (("scale", scale), ("ratio", ratio)):
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
            raise ValueError(f"{op}: {name} must be two positive numbers in ascending order, got {bounds}")
    attempts = 10
    draws = torch.rand(sizes.shape[0], 2 * attempts + 2, generator=generator, device=sizes.device, dtype=torch.float32)
    areas, ratios, place = draws.split([attempts, attempts, 2], dim=1)
    # Bounds stay numbers: tensors of them would be copied from the host, which waits for the device.
    areas = sizes.prod(dim=1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * areas)  # [N, 10]
    ratios = ratio[0] * (ratios * math.log(ratio[1] / ratio[0])).exp()
    drawn = torch.stack([areas / ratios, areas * ratios], dim=2).sqrt().round()  # [N, 10, 2] height, width
    # As high as the width allows, and as wide as the height.
    largest = torch.stack([sizes[:, 1] / ratio[0], sizes[:, 0] * ratio[1]], dim=1).round().minimum(sizes).clamp(min=1)
    fits = ((drawn > 0) & (drawn <= sizes[:, None])).all(dim=2)  # [N, 10]
    none_fits = ~fits.any(dim=1, keepdim=True)
    first = fits.int().argmax(dim=1)[:, None, None].expand(-1, -1, 2)
    sides = torch.where(none_fits, largest, drawn.gather(1, first)[:, 0]).long()  # [N, 2]
    room = sizes - sides
    # A draw close to 1 may be rounded up to one place too far.
    corners = torch.where(none_fits, room // 2, (place * (room + 1)).long().minimum(room))
    return torch.cat([corners, sides], dim=1)


def _random_resized_crop_check(
    images: Tensor, starts: Tensor | None, sizes: Tensor | None, boxes: Tensor, flips: Tensor, size: list[int]
) -> None:
    op = "random_resized_crop"
    if starts is not None and sizes is not None:
        checks.packed_values(op, starts, sizes, images.shape[1])
    checks.box_values(op, "boxes", boxes, images.shape[2:] if sizes is None else sizes)


def _random_resized_crop_eager(
    images: Tensor, starts: Tensor | None, sizes: Tensor | None, boxes: Tensor, flips: Tensor, size: list[int]
) -> Tensor:
    """Products with blocks of the weights: on a CPU half the time of F.interpolate, which adds tap by tap."""
    pictures: Tensor | list[Tensor] = images
    if starts is not None and sizes is not None:
        pictures = [
            images[:, begin : begin + height * width].unflatten(1, (height, width))
            for begin, (height, width) in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
    channels = pictures[0].shape[0]
    out = images.new_empty((len(pictures), channels, *size))
    # One piece of memory for all images: a new one for each would cost as much as the products.
    most_pixels = channels * int((boxes[:, 2] * boxes[:, 3]).max())
    most_rows = channels * int(boxes[:, 2].max())
    pixels, rows, result = (
        torch.empty(length, device=out.device)
        for length in (most_pixels, most_rows * size[1], channels * size[0] * size[1])
    )
    filters_y, filters_x = _filters(boxes[:, 2], size[0], None), _filters(boxes[:, 3], size[1], flips)
    resized = result.view(channels, *size)
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        crop, narrow = _first(pixels, channels, height, width), _first(rows, channels, height, size[1])
        crop.copy_(pictures[n][:, top : top + height, left : left + width])
        crop, outputs = crop.view(-1, width), narrow.view(-1, size[1]).split(_BLOCK, dim=1)
        for output, (weights, begin, length) in zip(outputs, _bands(filters_x, n, width), strict=True):
            torch.mm(crop.narrow(1, begin, length), weights, out=output)
        outputs = resized.split(_BLOCK, dim=1)
        for output, (weights, begin, length) in zip(outputs, _bands(filters_y, n, height), strict=True):
            torch.bmm(weights.t().expand(channels, -1, -1), narrow.narrow(1, begin, length), out=output)
        out[n] = resized.round_().clamp_(0, 255)
    return out


def _first(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


class _Filters(NamedTuple):
    taps: list[int]  # of each sample, t
    firsts: list[list[int]]  # [N, out], the first input under the filter of each output
    places: Tensor  # [N, T, out], the inputs; those of the sample are the first t
    weights: Tensor  # [N, T, out]


def _filters(lengths: Tensor, out_length: int, flips: Tensor | None) -> _Filters:
    lengths = lengths[:, None]  # [N, 1]
    scale = lengths / out_length
    stretch = scale.clamp(min=1)
    taps = (4 * stretch).long().add_(1).minimum(lengths)  # [N, 1]
    out = torch.arange(out_length, device=lengths.device).expand(len(lengths), -1)  # [N, out]
    if flips is not None:
        out = torch.where(flips[:, None], out_length - 1 - out, out)
    center = (out + 0.5) * scale
    first = (center - (2 * stretch - 0.5)).long().clamp_(min=0).minimum(lengths - taps)
    tap = torch.arange(taps.max().item(), device=lengths.device)[:, None]  # [T, 1]
    places = first[:, None] + tap  # [N, T, out]
    x = (places + (0.5 - center[:, None])).abs_().div_(stretch[:, None])
    # Keys' convolution kernel with a = -0.5.
    near = ((1.5 * x - 2.5) * x * x).add_(1)
    far = (((2.5 - 0.5 * x) * x).sub_(4) * x).add_(2)
    weights = torch.where(x < 1, near, far).masked_fill_((x >= 2) | (tap >= taps[:, None]), 0)
    weights /= weights.sum(dim=1, keepdim=True)
    return _Filters(taps[:, 0].tolist(), first.tolist(), places, weights)


def _bands(filters: _Filters, n: int, length: int) -> Iterator[tuple[Tensor, int, int]]:
    """For each block of outputs the weights ``[inputs, outputs]`` of the inputs under its filters: which, how many."""
    taps, firsts = filters.taps[n], filters.firsts[n]
    weights = filters.weights.new_zeros(length, len(firsts))
    weights.scatter_(0, filters.places[n, :taps], filters.weights[n, :taps])
    for i, block in enumerate(weights.split(_BLOCK, dim=1)):
        ends = firsts[i * _BLOCK], firsts[i * _BLOCK + block.shape[1] - 1]  # a flip turns them around
        begin, stop = min(ends), max(ends) + taps
        yield block.narrow(0, begin, stop - begin), begin, stop - begin


def _random_resized_crop_fake(
    images: Tensor, starts: Tensor | None, sizes: Tensor | None, boxes: Tensor, flips: Tensor, size: list[int]
) -> Tensor:
    channels = images.shape[1] if sizes is None else images.shape[0]
    return images.new_empty((boxes.shape[0], channels, *size))


_random_resized_crop = register_op(
    "random_resized_crop(Tensor images, Tensor? starts, Tensor? sizes, Tensor boxes, Tensor flips, SymInt[2] size) "
    "-> Tensor",
    eager=_random_resized_crop_eager,
    fake=_random_resized_crop_fake,
    check=_random_resized_crop_check,
)
