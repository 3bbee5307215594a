"""Crops are within one level of 255 of PyTorch's antialiased bicubic resizing in float64, image by image."""

import math

import pytest
import torch
from cases import IMAGE_STRIDES, U8, crop_inputs, images

from mae_kernels import PackedImages, random_crop_boxes, random_resized_crop, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")


def assert_right(images, boxes, flips, size):
    """Before rounding within a 256th of a level of float64: equal, but for numbers about halfway between two levels."""
    ours = random_resized_crop(images, boxes, flips, size)
    each = unpacked(images) if isinstance(images, PackedImages) else images
    gold = reference.random_resized_crop(each, boxes, flips, size, dtype=torch.float64, rounded=False)
    assert ours.dtype == U8
    assert ours.is_contiguous()
    assert ours.shape == gold.shape
    off = (ours.double() - gold.clamp(0, 255)).abs().max().item()
    assert off <= 0.5 + 2**-8, f"off by {off} levels, rounding included"
    return ours


def unpacked(packed):
    spans = zip(packed.starts.tolist(), packed.sizes.tolist(), strict=True)
    return [packed.pixels[:, start : start + h * w].unflatten(1, (h, w)) for start, (h, w) in spans]


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 9, 7), (20, 33)),  # wider and higher
        ((2, 3, 45, 40), (13, 9)),  # narrower and lower
        ((1, 0, 7, 35), (40, 6)),  # higher and narrower
        ((0, 5, 60, 3), (11, 70)),  # lower and wider, in two blocks of columns
        ((30, 40, 1, 1), (5, 4)),
        ((10, 0, 1, 64), (3, 17)),
        ((0, 63, 61, 1), (16, 3)),
        ((5, 6, 20, 16), (1, 1)),
        ((0, 0, 61, 64), (17, 65)),  # one row and one column more than a tile
    ],
)
def test_boxes_and_sizes(box, size):
    pictures = images(2, 1, 61, 64, U8)
    assert_right(pictures, torch.tensor([box, box]), torch.tensor([False, True]), size)


@pytest.mark.parametrize("c", [1, 3, 4, 13])
def test_channels(c):
    inputs = crop_inputs(2, c, 30, 21, 12)
    assert_right(**inputs)


@pytest.mark.parametrize("strides", IMAGE_STRIDES)
def test_image_strides(strides):
    assert_right(**crop_inputs(2, 3, 16, 24, (10, 14), strides=strides))


def test_other_strides():
    inputs = crop_inputs(3, 1, 16, 24, (10, 14))
    inputs["boxes"] = inputs["boxes"].t().contiguous().t()
    inputs["flips"] = inputs["flips"].repeat_interleave(2)[::2]
    assert_right(**inputs)
    packed = PackedImages.pack(list(inputs["images"]))
    starts, sizes = packed.starts.repeat_interleave(2)[::2], packed.sizes.t().contiguous().t()
    interleaved = PackedImages(packed.pixels.t().contiguous().t(), starts, sizes)
    assert torch.equal(random_resized_crop(**inputs | {"images": interleaved}), random_resized_crop(**inputs))


def test_images_of_different_sizes():
    pictures = [images(1, 2, h, w, U8)[0] for h, w in ((7, 40), (33, 20), (1, 1), (24, 24))]
    pictures[1] = pictures[1].transpose(1, 2)  # 20 x 33, of other strides
    boxes = random_crop_boxes(torch.tensor([x.shape[1:] for x in pictures]))
    flips = torch.tensor([True, False, False, True])
    packed = PackedImages.pack(pictures)
    assert torch.equal(packed.sizes, torch.tensor([[7, 40], [20, 33], [1, 1], [24, 24]]))
    ours = assert_right(packed, boxes, flips, (18, 11))
    assert torch.equal(random_resized_crop(pictures, boxes, flips, (18, 11)), ours)
    assert torch.equal(random_resized_crop(tuple(pictures), boxes, flips, (18, 11)), ours)
    order = torch.tensor([2, 0, 3])  # some images of a buffer, in another order
    some = PackedImages(packed.pixels, packed.starts[order], packed.sizes[order])
    assert torch.equal(random_resized_crop(some, boxes[order], flips[order], (18, 11)), ours[order])


def test_a_box_of_the_size_asked_for_is_copied():
    pictures = images(2, 3, 20, 30, U8)
    boxes, flips = torch.tensor([[3, 4, 13, 21], [0, 9, 13, 21]]), torch.tensor([False, True])
    ours = random_resized_crop(pictures, boxes, flips, (13, 21))
    assert torch.equal(ours[0], pictures[0, :, 3:16, 4:25])
    assert torch.equal(ours[1], pictures[1, :, 0:13, 9:30].flip(-1))


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_flat_pictures_stay_flat(level):
    pictures = torch.full((1, 1, 20, 25), level, dtype=U8)
    for size in ((7, 9), (23, 31)):
        ours = random_resized_crop(pictures, torch.tensor([[0, 0, 19, 25]]), torch.tensor([False]), size)
        assert (ours == level).all()


def test_overshoot_is_clipped():
    pictures = torch.zeros(1, 1, 8, 8, dtype=U8)
    pictures[..., 4:] = 255
    ours = assert_right(pictures, torch.tensor([[0, 0, 8, 8]]), torch.tensor([False]), (8, 32))
    assert (ours[0, 0, :, 0] == 0).all()
    assert (ours[0, 0, :, -1] == 255).all()


@pytest.mark.parametrize("size", [(6, 5), (20, 33)])
def test_nothing_outside_the_box_is_read(size):
    pictures = images(2, 1, 24, 24, U8)
    boxes, flips = torch.tensor([[4, 6, 9, 12], [0, 13, 24, 11]]), torch.tensor([False, True])
    results = []
    for other in (0, 255):
        poisoned = torch.full_like(pictures, other)
        for x, picture, (top, left, height, width) in zip(poisoned, pictures, boxes.tolist(), strict=True):
            box = (slice(None), slice(top, top + height), slice(left, left + width))
            x[box] = picture[box]
        results += [random_resized_crop(poisoned, boxes, flips, size)]
        results += [random_resized_crop(list(poisoned), boxes, flips, size)]
    assert all(torch.equal(x, results[0]) for x in results)


def test_the_images_are_not_modified():
    inputs = crop_inputs(2, 3, 16, 24, (10, 14))
    before = inputs["images"].clone()
    random_resized_crop(**inputs)
    assert torch.equal(inputs["images"], before)


def test_two_runs_are_bitwise_equal():
    inputs = crop_inputs(2, 2, 30, 20, (17, 24))
    assert torch.equal(random_resized_crop(**inputs), random_resized_crop(**inputs))


@pytest.mark.eager
@pytest.mark.parametrize("packed", [False, True])
def test_compile_with_boxes_drawn_inside(packed):
    def augment(pictures, sizes, draws):
        return random_resized_crop(pictures, random_crop_boxes(sizes), draws < 0.5, (9, 14))

    pictures, sizes, draws = images(3, 2, 16, 24, U8), torch.tensor([[16, 24]] * 3), torch.rand(3)
    pictures = PackedImages.pack(list(pictures)) if packed else pictures
    torch._dynamo.reset()
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = augment(pictures, sizes, draws)
    torch.manual_seed(1)
    assert torch.equal(compiled(pictures, sizes, draws), expected)


@pytest.mark.eager
def test_compile_packs_a_list():
    inputs = crop_inputs(3, 2, 16, 24, (9, 14))
    inputs["images"] = list(inputs["images"])
    torch._dynamo.reset()
    compiled = torch.compile(random_resized_crop, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), random_resized_crop(**inputs))


@pytest.mark.parametrize("height", [1, 5, 20])
def test_one_column(height):
    # PyTorch 2.13 makes all rows of one column equal, so the reference is that of the picture on its side.
    pictures, flips = images(1, 1, 8, 9, U8), torch.tensor([False])
    ours = random_resized_crop(pictures, torch.tensor([[0, 1, 8, 5]]), flips, (height, 1))
    lying = assert_right(pictures.transpose(2, 3), torch.tensor([[1, 0, 5, 8]]), flips, (1, height))
    assert torch.equal(ours, lying.transpose(2, 3))


# What follows draws boxes only, which no kernel does.


def drawn(height, width, n=20_000, **options):
    boxes = random_crop_boxes(torch.tensor([[height, width]]).expand(n, 2), **options)
    assert boxes.dtype == torch.int64
    assert boxes.shape == (n, 4)
    top, left, h, w = boxes.double().unbind(1)
    assert ((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)).all()
    return top, left, h, w


def assert_uniform(values, low, high):
    """Kolmogorov and Smirnov's distance, at most the one that 1 of 10^6 samples exceeds."""
    place = (values.sort().values - low) / (high - low)
    n = len(place)
    assert (place - torch.arange(0.5, n, dtype=torch.float64) / n).abs().max() <= 2.7 / math.sqrt(n) + 1 / n


@pytest.mark.eager
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.3)])
def test_areas_and_ratios_are_those_published(scale):
    # So large that rounding does not count, and areas so small that every ratio fits, where the law is exact.
    _, _, h, w = drawn(30_000, 30_000, scale=(scale[0], min(scale[1], 0.75)))
    assert_uniform(h * w / 30_000**2, scale[0], min(scale[1], 0.75))
    assert_uniform((w / h).log(), math.log(3 / 4), math.log(4 / 3))


@pytest.mark.eager
def test_a_box_too_large_is_drawn_again():
    # The law of the published loop: of area and ratio, given that the box fits.
    draws = torch.rand(400_000, 2, dtype=torch.float64)
    area, ratio = 375 * 500 * (0.2 + 0.8 * draws[:, 0]), 3 / 4 * (16 / 9) ** draws[:, 1]
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h <= 375) & (w <= 500)
    assert 0.7 < fits.double().mean() < 0.95
    _, _, ours_h, ours_w = drawn(375, 500, n=100_000)
    for ours, expected in ((ours_h, h[fits]), (ours_w, w[fits]), (ours_h * ours_w, (h * w)[fits])):
        quantiles = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
        levels = expected.quantile(quantiles)
        below = (ours[:, None] <= levels).double().mean(dim=0)
        assert (below - (expected[:, None] <= levels).double().mean(dim=0)).abs().max() < 0.012


@pytest.mark.eager
def test_places_are_uniform_and_reach_both_ends():
    top, left, h, w = drawn(3, 2, scale=(0.15, 0.2), n=6000)  # 1 x 1 in 3 x 2
    assert ((h == 1) & (w == 1)).all()
    counts = torch.bincount((2 * top + left).long(), minlength=6)
    assert (counts - 1000).abs().max() < 150
    top, left, h, w = drawn(1000, 1000, scale=(0.25, 0.25), ratio=(1, 1))
    assert ((h == 500) & (w == 500)).all()
    assert_uniform(top + 0.5, 0, 501)
    assert_uniform(left + 0.5, 0, 501)


@pytest.mark.eager
@pytest.mark.parametrize(
    ("size", "options", "box"),
    [
        ((10, 400), {}, (0, 193, 10, 13)),
        ((400, 10), {}, (193, 0, 13, 10)),
        ((400, 1), {}, (199, 0, 1, 1)),
        ((20, 30), {"scale": (2, 3), "ratio": (0.5, 2)}, (0, 0, 20, 30)),
        ((20, 30), {"scale": (2, 3), "ratio": (0.2, 1)}, (0, 5, 20, 20)),
        ((1, 3), {"scale": (4, 4), "ratio": (5, 5)}, (0, 0, 1, 3)),
    ],
)
def test_where_none_fits_the_largest_central_box_is_taken(size, options, box):
    boxes = random_crop_boxes(torch.tensor([size] * 50), **options)
    sides = boxes[:, 2:].tolist()
    assert list(box[2:]) in sides
    assert box in [tuple(found) for found in boxes.tolist()]
    if "scale" in options:  # no attempt fits
        assert (boxes == torch.tensor(box)).all()


@pytest.mark.eager
def test_the_generator_fixes_the_boxes():
    sizes = torch.randint(1, 500, (64, 2))
    first, second, other = (
        random_crop_boxes(sizes, generator=torch.Generator(sizes.device).manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
