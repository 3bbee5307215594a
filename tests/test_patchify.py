"""Patches are a permutation of pixels: exact, both ways."""

import pytest
import torch
from cases import BF16, F16, F32, F64, IMAGE_STRIDES, compare, images

from mae_kernels import patchify, reference, unpatchify

pytestmark = pytest.mark.usefixtures("poisoned_empty")

U8 = torch.uint8
SIZES = [
    (1, (1, 1), (16, 16), 3, F32),
    (3, (7, 7), (8, 8), 1, F64),
    (1, (14, 14), (14, 14), 3, BF16),
    (3, (3, 5), (8, 16), 4, F32),
    (1, (5, 3), (16, 8), 13, F16),
    (3, (2, 4), (14, 8), 3, U8),
]


def pixel_by_pixel(x, patch, layout):
    """Indices written out: value e of patch l is the pixel (row, column, channel)."""
    (n, c, h, w), (ph, pw) = x.shape, patch
    gw = w // pw
    out = torch.zeros(n, h // ph * gw, c * ph * pw, dtype=x.dtype)
    for channel in range(c):
        for p in range(ph):
            for q in range(pw):
                e = (p * pw + q) * c + channel if layout == "channels_last" else (channel * ph + p) * pw + q
                out[:, :, e] = x[:, channel, p::ph, q::pw].reshape(n, -1)
    return out


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("n", "grid", "patch", "c", "dtype"), SIZES)
def test_patchify_and_back(n, grid, patch, c, dtype, layout):
    x = images(n, c, grid[0] * patch[0], grid[1] * patch[1], dtype)
    patches = patchify(x, patch, layout)
    assert patches.dtype == dtype
    assert torch.equal(patches, pixel_by_pixel(x, patch, layout))
    assert torch.equal(patches, reference.patchify(x, patch, layout))
    back = unpatchify(patches, patch, tuple(x.shape[2:]), layout)
    assert back.dtype == dtype
    assert torch.equal(back, x)
    assert torch.equal(reference.unpatchify(patches, patch, tuple(x.shape[2:]), layout), x)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("strides", IMAGE_STRIDES)
def test_image_strides(strides, layout):
    x = images(3, 3, 24, 32, strides=strides)
    assert torch.equal(patchify(x, (8, 16), layout), pixel_by_pixel(x, (8, 16), layout))


def test_the_published_layout_and_square_patches_are_the_default():
    x = images(2, 3, 28, 28)
    assert torch.equal(patchify(x, 14), pixel_by_pixel(x, (14, 14), "channels_last"))
    assert torch.equal(unpatchify(patchify(x, 14), 14, 28), x)
    assert torch.equal(unpatchify(patchify(x, [7, 14]), [7, 14], [28, 28]), x)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_gradients(layout):
    def ours(images):
        return patchify(images, (8, 16), layout)

    def published(images):
        return reference.patchify(images, (8, 16), layout)

    inputs = {"images": images(3, 4, 24, 32, strides="channels_last")}
    compare(ours, published, inputs, torch.randn(3, 6, 512), ("images",), exact=("value", "images"))


def test_gradcheck():
    x = images(1, 3, 4, 6, F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patchify(x, (2, 3)), (x,))
    assert torch.autograd.gradgradcheck(lambda x: patchify(x, (2, 3)) ** 2, (x,))
    patches = torch.randn(1, 4, 18, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpatchify(x, (2, 3), (4, 6)), (patches,))
