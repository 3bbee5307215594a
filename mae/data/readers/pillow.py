"""Pictures and animations, read with Pillow; what it would cut to 8 bits is read whole."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, features

from mae.data.errors import DataError
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored
from mae.data.readers.values import ORIENTATION, SAMPLE_FORMAT, Values, alpha_of, interpreted, upright

_NOT_WHOLE = {"MPEG": "knows no more than the size", "FITS": "reads one plane, and not the scale,"}
_LIBRARIES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}


@contextmanager
def _without_stderr() -> Iterator[None]:
    """libtiff prints what it finds wrong with a file, and Pillow has no way to ask it not to."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def opened(file: Stored) -> Iterator[Any]:
    """An image, whose attributes are those of its format.

    Given a path, Pillow maps a raw TIFF into memory, with rows of the wrong length where it is to be turned.
    """
    with file.open() as stream, Image.open(stream) as image:
        yield image


def planes_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """``[C, H, W]``."""
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def read(file: Stored, reading: Reading, wanted: Wanted) -> Sequence[Image.Image] | Values:
    with opened(file) as image:
        if image.format in _NOT_WHOLE:
            raise DataError(f"Pillow {_NOT_WHOLE[image.format]} of {image.format}")
        reading.check_size(image.height, image.width)
        if reading.frames > 1:  # counting the frames of a file takes time
            return _frames(image, reading, wanted)
        factor = 1 << wanted.shrink(image.height, image.width).bit_length() - 1  # a JPEG knows 2, 4 and 8
        if factor > 1:  # rounded up, sides would have to be divided by less
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
        tile: Any = image.tile[0] if getattr(image, "tile", None) else None  # loading takes it away
        tags = image.tag_v2 if image.format == "TIFF" else {}
        with _without_stderr() if tile is not None and tile[0] == "libtiff" else nullcontext():
            image.load()
        key = image.info.get("transparency")
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)[None]
            if image.mode == "I" and image.format in ("PNG", "PPM"):
                values = values.astype(np.uint16)
            elif image.mode == "I" and image.format == "TIFF" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
                values = values.view(np.uint32)
            stored = _keyed(interpreted(values, tags), key)
        elif tile is not None and ";16" in _raw_mode(tile):
            values, alpha = _deep_colours(file, image), None
            if image.mode == "RGBA" and reading.channels in (1, 3):
                values, alpha = values[:-1], alpha_of(values[-1])
            stored = _keyed(interpreted(values, tags), key, alpha)
        elif image.format == "PPM" and image.mode == "RGB" and tile[0].startswith("ppm") and tile[3][-1] > 255:
            if tile[0] != "ppm":
                raise DataError("it holds colours of 16 bits as text")
            with file.open() as stream:
                stream.seek(tile[2])
                values = np.frombuffer(stream.read(6 * image.width * image.height), ">u2")
            values = values.reshape(image.height, image.width, 3).transpose(2, 0, 1)
            stored = Values((values * (65535 / tile[3][-1])).round().astype(np.uint16))
        else:
            ImageOps.exif_transpose(image, in_place=True)  # turns few pictures, and would copy all the others
            return (image,)
        return upright(stored, image.getexif().get(ORIENTATION))


def _frames(image: Image.Image, reading: Reading, wanted: Wanted) -> list[Image.Image]:
    """Frames of an animation, each as it is seen."""
    hidden = bool(image.info.get("default_image"))  # of an APNG, for readers that know no animation
    clip = reading.clip(getattr(image, "n_frames", 1) - hidden, wanted.start)
    frames = []
    for position in range(clip.start, clip.stop, clip.step):
        image.seek(position + hidden)
        frames.append(ImageOps.exif_transpose(image))
    return frames


def _raw_mode(tile: tuple[Any, ...]) -> str:
    """How the file lays out a pixel, in Pillow's words."""
    raw = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
    return raw if isinstance(raw, str) else ""


def _deep_colours(file: Stored, high: Image.Image) -> np.ndarray:
    """Bands ``[C, H, W]`` uint16 of a file of which Pillow gives the upper 8 bits.

    It is read again as if the bytes of each value stood the other way around.
    """

    def other_half(raw: str) -> str:
        order = {"N": "L" if sys.byteorder == "little" else "B"}.get(raw[-1], raw[-1])
        return raw[:-1] + ("B" if order == "L" else "L")

    with opened(file) as image:
        raw = _raw_mode(image.tile[0])
        change = {"LA;16B": lambda _: "RGBA"}.get(raw, other_half)
        image.tile = [
            ImageFile._Tile(
                codec, box, offset, (change(args[0]), *args[1:]) if isinstance(args, tuple) else change(args)
            )
            for codec, box, offset, args in image.tile
        ]
        with _without_stderr():
            image.load()
        low = planes_of(image)
    if raw == "LA;16B":  # four bytes a pixel, as they stand in the file
        return low[::2].astype(np.uint16) << 8 | low[1::2]
    return planes_of(high).astype(np.uint16) << 8 | low


def _keyed(values: np.ndarray, key: object, alpha: np.ndarray | None = None) -> Values:
    """With the pixels transparent that have the one value that the file names."""
    if isinstance(key, int | tuple):
        transparent = (values == np.reshape(key, (-1, 1, 1))).all(axis=0)
        alpha = np.where(transparent, 0, 255).astype(np.uint8)
    return Values(values, alpha)


def suffixes() -> set[str]:
    """Of the formats that this Pillow can decode, and not only name."""
    Image.init()
    missing = {name for name, library in _LIBRARIES.items() if not features.check(library)} | set(_NOT_WHOLE)
    if not EpsImagePlugin.has_ghostscript():
        missing.add("EPS")
    readers = {name: reader[0] for name, reader in Image.OPEN.items() if name not in missing}
    readable = {
        name
        for name, reader in readers.items()
        if not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))
    }
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
