"""As test_bad_calls.py, of what comes before the model: masks and crops."""

import pytest
import torch

from mae_kernels import (
    PackedImages,
    axis_masking,
    block_masking,
    grid_masking,
    masking_from_mask,
    random_crop_boxes,
    random_masking,
    random_resized_crop,
    tube_masking,
)

NAN, INF = float("nan"), float("inf")
V, T = ValueError, TypeError

MASK, IDS = torch.ones(2, 4).bool(), torch.arange(4).repeat(2, 1)
PIXELS = torch.zeros(2, 3, 6, 8, dtype=torch.uint8)
BOXES, FLIPS = torch.tensor([[0, 0, 6, 8], [1, 2, 3, 4]]), torch.tensor([True, False])
PACKED = PackedImages.pack([PIXELS[0], PIXELS[1, :, :4]])  # 48 and 32 places


def crop(images=PIXELS, boxes=BOXES, flips=FLIPS, size=5):
    return random_resized_crop(images, boxes, flips, size)


def box(*values):
    return torch.tensor([[0, 0, 6, 8], values])


def packed(**fields):
    return PACKED._replace(**fields)


def meta(x):
    return x.to("meta")


# fmt: off
CALLS = [
    # id, call, exception, message
    ("masking ratio 0", lambda: random_masking(2, 196, 0), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got 0"),
    ("masking ratio 1", lambda: random_masking(2, 196, 1), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got 1"),
    ("masking ratio -0.5", lambda: random_masking(2, 196, -0.5), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got -0.5"),
    ("masking ratio nan", lambda: random_masking(2, 196, NAN), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got nan"),
    ("masking ratio inf", lambda: random_masking(2, 196, INF), V,
     "random_masking: mask_ratio must lie strictly between 0 and 1, got inf"),
    ("masking ratio str", lambda: random_masking(2, 196, "0.75"), T,
     "random_masking: mask_ratio must be a number, got str"),
    ("masking none visible", lambda: random_masking(2, 10, 0.9), V,
     "random_masking: mask_ratio 0.9 of 10 patches leaves none visible"),
    ("masking none masked", lambda: random_masking(2, 10, 0.05, count="masked"), V,
     "random_masking: mask_ratio 0.05 of 10 patches leaves none masked"),
    ("masking negative batch", lambda: random_masking(-1, 10), V,
     "random_masking: batch_size must not be negative and num_patches positive, got -1 and 10"),
    ("masking no patches", lambda: random_masking(2, 0), V,
     "random_masking: batch_size must not be negative and num_patches positive, got 2 and 0"),
    ("masking float batch", lambda: random_masking(2.0, 10), T, "random_masking: batch_size must be an int, got float"),
    ("masking count", lambda: random_masking(2, 10, count="hidden"), V,
     "random_masking: count must be 'visible' or 'masked', got 'hidden'"),
    ("masking noise shape", lambda: random_masking(2, 10, noise=torch.rand(2, 9)), V,
     "random_masking: noise must be [2, 10], got shape (2, 9)"),
    ("masking noise int64", lambda: random_masking(2, 4, noise=IDS), T,
     "random_masking: noise must be float32, float16, bfloat16 or float64, got int64"),
    ("masking noise list", lambda: random_masking(2, 4, noise=[0]), T,
     "random_masking: noise must be a torch.Tensor, got list"),
    ("masking noise and device", lambda: random_masking(2, 4, noise=IDS.float(), device="cpu"), V,
     "random_masking: noise fixes the mask and its device; leave out generator and device"),
    ("mask uneven", lambda: masking_from_mask(IDS.gt(torch.tensor([[2], [1]]))), V,
     ("masking_from_mask: every row must hide the same number of patches, but row 0 hides 1 and row 1 hides 2; "
      "pass num_keep, the largest number of visible patches in a row")),
    ("mask full", lambda: masking_from_mask(MASK), V, "masking_from_mask: mask leaves none of the 4 patches visible"),
    ("mask bare", lambda: masking_from_mask(~MASK), V, "masking_from_mask: mask leaves none of the 4 patches masked"),
    ("mask float", lambda: masking_from_mask(MASK.float()), T,
     "masking_from_mask: mask must be bool with True = removed, got float32; call .bool()"),
    ("mask 1-D", lambda: masking_from_mask(MASK[0]), V, "masking_from_mask: mask must be [N, L], got shape (4,)"),
    ("mask empty", lambda: masking_from_mask(MASK[:0]), V, "masking_from_mask: mask is empty, got shape (0, 4)"),
    ("mask of one patch", lambda: masking_from_mask(MASK[:, :1], 1), V,
     "masking_from_mask: mask must have at least two patches in a row, got shape (2, 1)"),
    ("mask with a row of none", lambda: masking_from_mask(IDS.lt(torch.tensor([[2], [4]])), 3), V,
     "masking_from_mask: every row must have 1 to num_keep = 3 visible patches, but row 1 has 0"),
    ("mask with a row of too many", lambda: masking_from_mask(IDS.lt(torch.tensor([[2], [1]])), 2), V,
     "masking_from_mask: every row must have 1 to num_keep = 2 visible patches, but row 1 has 3"),
    ("mask num_keep 0", lambda: masking_from_mask(MASK, 0), V,
     "masking_from_mask: num_keep must be 1 to 4, the number of patches, got 0"),
    ("mask num_keep 5", lambda: masking_from_mask(MASK, 5), V,
     "masking_from_mask: num_keep must be 1 to 4, the number of patches, got 5"),
    ("mask num_keep float", lambda: masking_from_mask(MASK, 2.0), T,
     "masking_from_mask: num_keep must be an int, got float"),

    ("tube ratio", lambda: tube_masking(2, (2, 4, 4), 1), V,
     "tube_masking: mask_ratio must lie strictly between 0 and 1, got 1"),
    ("tube none masked", lambda: tube_masking(2, (9, 2, 4), 0.1), V,
     "tube_masking: mask_ratio 0.1 of 8 patches leaves none masked"),
    ("tube grid", lambda: tube_masking(2, (1, 2, 4, 4)), V,
     "tube_masking: grid must be a positive int, or two or three of them, got (1, 2, 4, 4)"),
    ("block grid", lambda: block_masking(2, (4, 0)), V,
     "block_masking: grid must be a positive int, or two or three of them, got (4, 0)"),
    ("block batch", lambda: block_masking(-1, 4), V,
     "block_masking: batch_size must not be negative and num_patches positive, got -1 and 16"),
    ("grid ratio", lambda: grid_masking(2, 4, 0.6), V,
     ("grid_masking: mask_ratio must be 0.25, 0.5 or 0.75, whole patches of every 2 x 2, got 0.6; "
      "random_masking takes any ratio")),
    ("axis share 1", lambda: axis_masking(2, 4, share=1), V,
     "axis_masking: share must be a number in [0, 1), or 2 of them, one for each axis, got 1"),
    ("axis shares of images", lambda: axis_masking(2, (3, 4, 4), share=(0, 0.5)), V,
     "axis_masking: share must be a number in [0, 1), or 3 of them, one for each axis, got (0, 0.5)"),
    ("axis share too large", lambda: axis_masking(2, 4, share=0.5, mask_ratio=0.7), V,
     ("axis_masking: lines of share 0.5 hold 12 patches, more than mask_ratio 0.7 of 16 hides; "
      "lower share or raise mask_ratio")),

    ("crop float", lambda: crop(PIXELS.float()), T, "random_resized_crop: images must be uint8, got float32"),
    ("crop array", lambda: crop(PIXELS.numpy()), T, "random_resized_crop: images must be a torch.Tensor, got ndarray"),
    ("crop 3-D", lambda: crop(PIXELS[0]), V,
     "random_resized_crop: images must be [N, C, H, W], got shape (3, 6, 8)"),
    ("crop packed none", lambda: crop(packed(starts=BOXES[:0, 0], sizes=BOXES[:0, :2]), BOXES[:0], FLIPS[:0]), V,
     "random_resized_crop: images.starts is empty, got shape (0,)"),
    ("crop empty", lambda: crop(PIXELS[:, :, :0]), V,
     "random_resized_crop: images is empty, got shape (2, 3, 0, 8)"),
    ("crop size 0", lambda: crop(size=(5, 0)), V,
     "random_resized_crop: size must be a positive int or a pair of them, got (5, 0)"),
    ("crop size float", lambda: crop(size=5.5), V,
     "random_resized_crop: size must be a positive int or a pair of them, got 5.5"),
    ("crop boxes list", lambda: crop(boxes=BOXES.tolist()), T,
     "random_resized_crop: boxes must be a torch.Tensor, got list"),
    ("crop boxes batch", lambda: crop(boxes=BOXES[:1]), V,
     "random_resized_crop: boxes must be [2, 4], got shape (1, 4)"),
    ("crop boxes float", lambda: crop(boxes=BOXES.float()), T,
     "random_resized_crop: boxes must be int64, got float32; call .long()"),
    ("crop flips batch", lambda: crop(flips=FLIPS[:1]), V, "random_resized_crop: flips must be [2], got shape (1,)"),
    ("crop flips uint8", lambda: crop(flips=FLIPS.byte()), T,
     "random_resized_crop: flips must be bool, got uint8; call .bool()"),
    ("crop boxes device", lambda: crop(boxes=meta(BOXES)), V,
     "random_resized_crop: boxes is on meta, but images is on cpu"),
    ("crop flips device", lambda: crop(flips=meta(FLIPS)), V,
     "random_resized_crop: flips is on meta, but images is on cpu"),
    ("crop box empty", lambda: crop(boxes=box(1, 2, 0, 4)), V,
     ("random_resized_crop: boxes[1], of 0 x 4 pixels from row 1 and column 2 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box negative", lambda: crop(boxes=box(-1, 2, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row -1 and column 2 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box low", lambda: crop(boxes=box(4, 2, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row 4 and column 2 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box wide", lambda: crop(boxes=box(0, 5, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row 0 and column 5 on, is empty or does not lie inside its "
      "image of 6 x 8")),
    ("crop box of a packed image", lambda: crop(PACKED, boxes=box(2, 2, 3, 4)), V,
     ("random_resized_crop: boxes[1], of 3 x 4 pixels from row 2 and column 2 on, is empty or does not lie inside its "
      "image of 4 x 8")),
    ("crop packed pixels", lambda: crop(packed(pixels=PIXELS)), V,
     "random_resized_crop: images.pixels must be [C, B], got shape (2, 3, 6, 8)"),
    ("crop packed float", lambda: crop(packed(pixels=PACKED.pixels.float())), T,
     "random_resized_crop: images must be uint8, got float32"),
    ("crop packed starts", lambda: crop(packed(starts=PACKED.starts.int())), T,
     "random_resized_crop: images.starts must be int64, got int32; call .long()"),
    ("crop packed sizes", lambda: crop(packed(sizes=PACKED.sizes[:1])), V,
     "random_resized_crop: images.sizes must be [2, 2], got shape (1, 2)"),
    ("crop packed sizes device", lambda: crop(packed(sizes=meta(PACKED.sizes))), V,
     "random_resized_crop: sizes is on meta, but images is on cpu"),
    ("crop packed too far", lambda: crop(packed(starts=torch.tensor([0, 49]))), V,
     ("random_resized_crop: image 1, of 4 x 8 pixels from place 49 on, does not lie inside the 80 places of "
      "images.pixels")),
    ("crop packed too large", lambda: crop(packed(sizes=torch.tensor([[2**40, 2**40], [4, 8]]))), V,
     ("random_resized_crop: image 0, of 1099511627776 x 1099511627776 pixels from place 0 on, does not lie inside the "
      "80 places of images.pixels")),
    ("crop list of none", lambda: crop([]), V, "PackedImages.pack: images is empty"),
    ("crop list of floats", lambda: crop([PIXELS[0], PIXELS[1].float()]), T,
     "PackedImages.pack: images[1] must be uint8, got float32"),
    ("crop list of arrays", lambda: crop([PIXELS[0].numpy()]), T,
     "PackedImages.pack: images[0] must be a torch.Tensor, got ndarray"),
    ("crop list of channels", lambda: crop([PIXELS[0], PIXELS[1, :1]]), V,
     "PackedImages.pack: images[1] has 1 channels, but images[0] has 3"),
    ("crop list of batches", lambda: crop([PIXELS, PIXELS]), V,
     "PackedImages.pack: images[0] must be [C, H, W], got shape (2, 3, 6, 8)"),
    ("crop list with an empty image", lambda: crop([PIXELS[0], PIXELS[1, :, :, :0]]), V,
     "PackedImages.pack: images[1] is empty, got shape (3, 6, 0)"),
    ("crop list of devices", lambda: crop([PIXELS[0], meta(PIXELS[1])]), V,
     "PackedImages.pack: images[1] is on meta, but images[0] is on cpu"),
    ("boxes sizes 1-D", lambda: random_crop_boxes(torch.tensor([6, 8])), V,
     "random_crop_boxes: sizes must be [N, 2], got shape (2,)"),
    ("boxes sizes float", lambda: random_crop_boxes(torch.rand(2, 2)), T,
     "random_crop_boxes: sizes must be int64, got float32; call .long()"),
    ("boxes scale", lambda: random_crop_boxes(PACKED.sizes, scale=(0.5, 0.2)), V,
     "random_crop_boxes: scale must be two positive numbers in ascending order, got (0.5, 0.2)"),
    ("boxes ratio 0", lambda: random_crop_boxes(PACKED.sizes, ratio=(0, 1)), V,
     "random_crop_boxes: ratio must be two positive numbers in ascending order, got (0, 1)"),
    ("boxes ratio nan", lambda: random_crop_boxes(PACKED.sizes, ratio=(NAN, 1)), V,
     "random_crop_boxes: ratio must be two positive numbers in ascending order, got (nan, 1)"),
]
# fmt: on


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=name) for name, *row in CALLS])
def test_message(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message
