"""What a model takes, and which part of a file that is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mae.data.errors import DataError, counted


@dataclass(frozen=True)
class Reading:
    """What the model takes, and how files become that.

    Raises:
        ValueError: no channels, no pixels, or a range whose ends are not two finite numbers in ascending order.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    """Values that become black and white; None decides for each picture, see :func:`mae.data.levels.to_8_bits`."""
    max_pixels: int = 178_956_970
    """Height times width from which on a picture or frame is refused; the default is Pillow's own."""
    frame_stride: int = 1
    """Frames of a file from one of the model's to the next; a file with too few for that has the largest that fits."""
    image_size: tuple[int, ...] = (224, 224)
    """Height and width, of a model of clips and volumes frames, height and width."""

    def __post_init__(self) -> None:
        for name in ("channels", "max_pixels", "frame_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.value_range is not None:
            low, high = self.value_range
            if not -np.inf < low < high < np.inf:
                raise ValueError(f"value_range must be two finite numbers in ascending order, got {low:g} and {high:g}")

    @property
    def frames(self) -> int:
        return math.prod(self.image_size[:-2])

    def clip(self, count: int, start: Callable[[int], int]) -> slice:
        """Which of so many frames the model gets, start choosing among the places where that clip fits.

        A model of one frame gets the first.
        """
        if count < self.frames:
            raise DataError(f"it has {counted(count, 'frame')}, and the model takes {self.frames}")
        if self.frames == 1:
            return slice(0, 1)
        stride = min(self.frame_stride, (count - 1) // (self.frames - 1))
        span = (self.frames - 1) * stride + 1
        begin = start(count - span + 1)
        return slice(begin, begin + span, stride)

    def check_size(self, height: int, width: int) -> None:
        if height * width == 0:
            raise DataError(f"it has no pixels: {height} x {width}")
        if height * width > self.max_pixels:
            size = f"{height * width:,} pixels ({width:,} x {height:,})"
            raise DataError(f"it has {size}, more than the {self.max_pixels:,} of --max-pixels")

    def check_channels(self, channels: int) -> None:
        if channels != self.channels and not {channels, self.channels} <= {1, 3}:
            raise DataError(f"it has {counted(channels, 'channel')}, and the model takes {self.channels}")


class Wanted(NamedTuple):
    """The part of a file that is wanted, which depends on how large the file turns out to be."""

    shrink: Callable[[int, int], int] = lambda height, width: 1  # by how much both may be divided
    start: Callable[[int], int] = lambda places: places // 2  # which of so many places a clip begins at: the middle
