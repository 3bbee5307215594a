"""Files as pictures and clips of 8 bits, with as many channels and frames as the model takes."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mae.data.errors import DataError, Unreadable, printable
from mae.data.levels import ENOUGH, PLAIN, to_8_bits
from mae.data.readers import READERS, Reading, Stored, Values, Wanted
from mae.data.readers.pillow import planes_of

Frame = Image.Image | np.ndarray  # [H, W] or [H, W, 3] uint8


class Picture(NamedTuple):
    """Pixels of 8 bits, frame by frame: one grey or colour image, or a grey one for each channel, all of one size."""

    images: tuple[Frame, ...]
    note: str = PLAIN  # how values of more than 8 bits became these, see mae.data.levels
    is_sound: bool = False  # a spectrogram of the model's size: neither cut nor resized nor flipped

    @property
    def height(self) -> int:
        return _size(self.images[0])[0]

    @property
    def width(self) -> int:
        return _size(self.images[0])[1]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """``[H, W]`` of one plane, else ``[H, W, T * C]``: uint8, as of an image of Pillow."""
        planes = np.concatenate([planes_of(image) for image in self.images])
        return (planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)).astype(dtype or np.uint8)

    def cut(self, box: tuple[int, int, int, int], factor: int) -> "Picture":
        """The box (left, top, right, bottom), of which factor times factor pixels become one, their mean."""
        with _quiet_pillow():
            return self._replace(images=tuple(_cut(image, box, factor) for image in self.images))

    def each(self, f: Callable[[Image.Image], Image.Image]) -> "Picture":
        with _quiet_pillow():
            return self._replace(images=tuple(map(f, map(_image, self.images))))


def read_image(file: str | Path | Stored, reading: Reading | int, wanted: Wanted | None = None) -> Picture:
    """The picture or clip of a file with the channels and frames of the model, upright, transparency on white.

    Grey is repeated for a model of three channels, colour becomes grey for a model of one. A model of one frame gets
    the first of an animation or video, and pages of a TIFF are its channels; for a model of several frames pages are
    frames. Frames are cut out of the file as :class:`Wanted` says, by default around its middle. A JPEG that may be
    shrunk takes less time to decode. A number in place of reading is that of the channels.

    Raises:
        Unreadable: the file cannot be decoded, has other channels or fewer frames than the model, too many pixels, or
            values that no range turns into 8 bits.
    """
    file = file if isinstance(file, Stored) else Stored(Path(file), str(file))
    reading = Reading(reading) if isinstance(reading, int) else reading
    try:
        file.check_regular()
        with file.open() as opened:
            head = opened.read(12)
        reader = next(r for r in READERS if r.magic.match(head))
        with _quiet_pillow():
            return _picture(reader.read(file, reading, wanted or Wanted()), reading)
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        raise Unreadable(f"cannot read {printable(file.name)}: {_reason(error)}") from error


def to_tensor(picture: Picture) -> Tensor:
    """``[T * C, H, W]`` uint8."""
    planes = [planes_of(image) for image in picture.images]
    return torch.from_numpy(np.concatenate(planes) if len(planes) > 1 else np.array(planes[0], order="C"))


def resize_and_crop(picture: Picture, size: tuple[int, int]) -> Picture:
    """The central part of each frame in the shape of size ``(H, W)``, resized to it."""
    return picture.each(lambda image: ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC))


def _picture(stored: Sequence[Frame] | Values, reading: Reading) -> Picture:
    """What a reader found as a picture with the channels of the model."""
    if not isinstance(stored, Values):
        frames = [_plain(image, reading) for image in stored]
        if reading.value_range is None:
            bands = [(frame,) if reading.channels in (1, 3) else _image(frame).split() for frame in frames]
            return Picture(sum(bands, ()))
        stored = Values(np.stack([planes_of(frame) for frame in frames], axis=1))
    channels, *_, height, width = stored.values.shape
    reading.check_channels(channels)
    pixels, note = to_8_bits(stored.values.reshape(channels, -1, height, width), reading.value_range)
    alphas = [None] * pixels.shape[1] if stored.alpha is None else stored.alpha.reshape(-1, height, width)
    bands = [_bands(frame, alpha, reading) for frame, alpha in zip(pixels.swapaxes(0, 1), alphas, strict=True)]
    return Picture(sum(bands, ()), note, stored.is_sound)


def _bands(frame: np.ndarray, alpha: np.ndarray | None, reading: Reading) -> tuple[Image.Image, ...]:
    """One frame ``[C, H, W]`` with the channels of the model."""
    bands = tuple(map(Image.fromarray, frame))
    if alpha is not None:
        colours = bands if len(bands) == 3 else bands * 3
        bands = _on_white(Image.merge("RGBA", (*colours, Image.fromarray(alpha)))).split()[: len(bands)]
    if len(bands) == reading.channels:
        return bands
    return bands * 3 if reading.channels == 3 else (Image.merge("RGB", bands).convert("L"),)


def _plain(image: Frame, reading: Reading) -> Frame:
    """An image of 8 bits and any mode as one with the bands of the model."""
    if isinstance(image, np.ndarray) and math.prod(image.shape[2:]) == reading.channels:
        return image
    image = _image(image)
    if reading.channels in (1, 3):
        if image.has_transparency_data:
            image = _on_white(image.convert("RGBA"))
        mode = "L" if reading.channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)
    if image.mode in ("1", "P", "PA"):
        image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    reading.check_channels(len(image.getbands()))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Of the same mode, RGBA; an alpha that shows nothing at all is none."""
    alpha = image.getchannel("A")
    if alpha.getextrema() == (0, 0):
        return image
    laid = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if (levels := _levels(laid)) < ENOUGH:
        shown = alpha.point(lambda x: 255 if x else 0)
        if levels < (held := _levels(image, shown)):
            raise DataError(f"laid on white by its alpha, it keeps {levels} of its {held} levels")
    return laid


def _levels(image: Image.Image, where: Image.Image | None = None) -> int:
    """How many of 256 its colours take, of an RGBA image."""
    return int(np.count_nonzero(np.reshape(image.histogram(where)[: 3 * 256], (3, 256)).any(axis=0)))


def _size(frame: Frame) -> tuple[int, int]:
    return (frame.height, frame.width) if isinstance(frame, Image.Image) else frame.shape[:2]


def _image(frame: Frame) -> Image.Image:
    return frame if isinstance(frame, Image.Image) else Image.fromarray(frame)


def _cut(frame: Frame, box: tuple[int, int, int, int], factor: int) -> Frame:
    if isinstance(frame, Image.Image):
        return frame.reduce(factor, box) if factor > 1 else frame.crop(box)
    left, top, right, bottom = box
    frame = frame[top:bottom, left:right]
    return Image.fromarray(frame).reduce(factor) if factor > 1 else frame


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Neither Pillow's warnings nor its limit of pixels, in place of which stands that of :class:`Reading`."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not in a format that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error) if isinstance(error, DataError) else (str(error) or type(error).__name__).strip())
