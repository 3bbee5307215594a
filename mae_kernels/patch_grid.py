"""How images are cut into patches, and every refusal about that."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import checks

Sizes = int | tuple[int, ...]  # one number for every side, (height, width), or (frames, height, width)

_SIDES = ("frames", "height", "width")


class PatchGrid(NamedTuple):
    """A grid of patches, in row-major order, of images ``[N, C, T, H, W]``; an image is a video of one frame."""

    patch: tuple[int, int, int]  # frames, height and width of a patch in pixels
    grid: tuple[int, int, int]  # patches along each of the three
    channels: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch[0] * self.patch[1] * self.patch[2]

    @classmethod
    def of(cls, op: str, images: Tensor, patch_size: Sizes) -> "PatchGrid":
        """The grid of images ``[N, C, H, W]`` or ``[N, C, T, H, W]``, empty in nothing but the batch.

        An int is the patch's size along every side that the images have, a pair is a patch of one frame.

        Raises:
            TypeError, ValueError: no such images, no such patch, or sides that are not multiples of it.
        """
        checks.tensor(op, "images", images, ("N", "C", "H", "W"), ("N", "C", "T", "H", "W"))
        checks.pixels(op, "images", images)
        _, channels, *sizes = images.shape
        if channels == 0 or 0 in sizes:
            side = ("channel dimension", *_SIDES[-len(sizes) :])[[channels, *sizes].index(0)]
            raise ValueError(f"{op}: the {side} of images is empty, got shape {tuple(images.shape)}")
        return cls._cut(op, sizes, patch_size, channels)

    @classmethod
    def of_sizes(cls, op: str, image_size: Sizes, patch_size: Sizes, channels: int) -> "PatchGrid":
        """The grid of images of such a size: an int for ``H = W``, a pair, or three numbers."""
        return cls._cut(op, checks.sizes(op, "image_size", image_size, 2), patch_size, channels)

    @classmethod
    def _cut(cls, op: str, sizes: Sequence[int], patch_size: Sizes, channels: int) -> "PatchGrid":
        patch, sizes = three_sides(checks.sizes(op, "patch_size", patch_size, len(sizes))), three_sides(sizes)
        (t, h, w), (pt, ph, pw) = sizes, patch
        if t % pt or h % ph or w % pw:
            side, size, p = next(x for x in zip(_SIDES, sizes, patch, strict=True) if x[1] % x[2])
            raise ValueError(f"{op}: images {side} {size} is not a multiple of the patch {side} {p}")
        return cls(patch, (t // pt, h // ph, w // pw), channels)

    @classmethod
    def inside(cls, sizes: Sequence[int], patch: Sequence[int], channels: int) -> "PatchGrid":
        """The grid of what has passed the border."""
        (t, h, w), (pt, ph, pw) = sizes, three_sides(patch)
        return cls((pt, ph, pw), (t // pt, h // ph, w // pw), channels)


def three_sides(sides: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of two or three sides."""
    frames, height, width = (1, *sides) if len(sides) == 2 else sides
    return frames, height, width


def as_video(images: Tensor) -> Tensor:
    """``[N, C, T, H, W]``; an image is a video of one frame."""
    return images.unsqueeze(2) if images.ndim == 4 else images
