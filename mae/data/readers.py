"""Files as arrays, with every value that they hold: what Pillow would cut away is read otherwise, or refused."""

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, UnidentifiedImageError, features
from scipy.io import wavfile

from mae.data.errors import DataError, counted
from mae.data.sound import HOP, RATE, WINDOW, below_loudest, mono, spectrogram

try:
    import tifffile
except ImportError:
    tifffile = None
try:
    import av
except ImportError:
    av = None
try:
    import soundfile
except (ImportError, OSError):  # OSError: the package is there, and the library that it wraps is not
    soundfile = None

_VIDEO = "the package av: pip install 'mae_kernels[video]'"
_AUDIO = "the package soundfile: pip install 'mae_kernels[audio]'"

# Without a handler Python prints what these say about damaged files.
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


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

    def __post_init__(self):
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


class Values(NamedTuple):
    """What a reader found in a file whose pixels are not plain 8 bits."""

    values: np.ndarray  # [C, H, W] or [C, T, H, W] of any dtype; nodata is masked (numpy.ma)
    alpha: np.ndarray | None = None  # [H, W] or [T, H, W] uint8, 0 is transparent
    is_sound: bool = False  # of the model's size, see mae.data.sound


class Wanted(NamedTuple):
    """The part of a file that is wanted, which depends on how large the file turns out to be."""

    shrink: Callable[[int, int], int] = lambda height, width: 1  # by how much both may be divided
    start: Callable[[int], int] = lambda places: places // 2  # which of so many places a clip begins at: the middle


class Reader(NamedTuple):
    """Reads one kind of files; another kind is another entry of READERS.

    ``read(file, reading, wanted)`` gives the pixels as they are stored: one image of 8 bits for each frame, or
    :class:`Values`. It asks ``reading`` about size and channels before it decodes, where it can, and may raise
    anything.
    """

    read: Callable[[Path, Reading, Wanted], Sequence[Image.Image] | Values]
    magic: re.Pattern[bytes]  # of the first bytes of such files
    suffixes: Callable[[], set[str]]
    missing: Callable[[], str] = lambda: ""  # the package that it waits for, and how to install it


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
def _opened(file: Path) -> Iterator[Image.Image]:
    """Given a path, Pillow maps a raw TIFF into memory, with rows of the wrong length where it is to be turned."""
    with open(file, "rb") as stream, Image.open(stream) as image:
        yield image


def planes_of(image: Image.Image) -> np.ndarray:
    """``[C, H, W]``."""
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def _read_with_pillow(file: Path, reading: Reading, wanted: Wanted) -> Sequence[Image.Image] | Values:
    with _opened(file) as image:
        if image.format in _NOT_WHOLE:
            raise DataError(f"Pillow {_NOT_WHOLE[image.format]} of {image.format}")
        reading.check_size(image.height, image.width)
        if reading.frames > 1:  # counting the frames of a file takes time
            return _frames(image, reading, wanted)
        factor = wanted.shrink(image.height, image.width)
        if factor > 1:
            image.draft(None, (-(-image.width // factor), -(-image.height // factor)))
        tile = image.tile[0] if getattr(image, "tile", None) else None  # loading takes it away
        tags = image.tag_v2 if image.format == "TIFF" else {}
        with _without_stderr() if tile is not None and tile[0] == "libtiff" else nullcontext():
            image.load()
        key = image.info.get("transparency")
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)[None]
            if image.mode == "I" and image.format in ("PNG", "PPM"):
                values = values.astype(np.uint16)
            elif image.mode == "I" and image.format == "TIFF" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
                values = values.view(np.uint32)
            stored = _keyed(_interpreted(values, tags), key)
        elif tile is not None and ";16" in _raw_mode(tile):
            values, alpha = _deep_colours(file, image), None
            if image.mode == "RGBA" and reading.channels in (1, 3):
                values, alpha = values[:-1], _alpha(values[-1])
            stored = _keyed(_interpreted(values, tags), key, alpha)
        elif image.format == "PPM" and image.mode == "RGB" and tile[0].startswith("ppm") and tile[3][-1] > 255:
            if tile[0] != "ppm":
                raise DataError("it holds colours of 16 bits as text")
            values = np.fromfile(file, ">u2", 3 * image.width * image.height, offset=tile[2])
            values = values.reshape(image.height, image.width, 3).transpose(2, 0, 1)
            stored = Values((values * (65535 / tile[3][-1])).round().astype(np.uint16))
        else:
            ImageOps.exif_transpose(image, in_place=True)  # turns few pictures, and would copy all the others
            return (image,)
        return _upright(stored, image.getexif().get(_ORIENTATION))


def _frames(image: Image.Image, reading: Reading, wanted: Wanted) -> list[Image.Image]:
    """Frames of an animation, each as it is seen."""
    hidden = bool(image.info.get("default_image"))  # of an APNG, for readers that know no animation
    clip = reading.clip(getattr(image, "n_frames", 1) - hidden, wanted.start)
    frames = []
    for position in range(clip.start, clip.stop, clip.step):
        image.seek(position + hidden)
        frames.append(ImageOps.exif_transpose(image))
    return frames


def _raw_mode(tile: tuple) -> str:
    """How the file lays out a pixel, in Pillow's words."""
    raw = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
    return raw if isinstance(raw, str) else ""


def _deep_colours(file: Path, high: Image.Image) -> np.ndarray:
    """Bands ``[C, H, W]`` uint16 of a file of which Pillow gives the upper 8 bits.

    It is read again as if the bytes of each value stood the other way around.
    """

    def other_half(raw: str) -> str:
        order = {"N": "L" if sys.byteorder == "little" else "B"}.get(raw[-1], raw[-1])
        return raw[:-1] + ("B" if order == "L" else "L")

    with _opened(file) as image:
        raw = _raw_mode(image.tile[0])
        change = {"LA;16B": lambda _: "RGBA"}.get(raw, other_half)
        image.tile = [
            ImageFile._Tile(*t[:3], (change(t[3][0]), *t[3][1:]) if isinstance(t[3], tuple) else change(t[3]))
            for t in image.tile
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


def _alpha(values: np.ndarray) -> np.ndarray:
    """As uint8. The largest value tells which one is opaque: colours of 12 bits in 16 have an alpha of as many."""
    highest = np.nan_to_num(values).max()
    most = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else highest
    opaque = next((x for x in (1, 255, 1023, 4095, 16383, 65535) if highest <= x < most), most) or 1
    return (np.nan_to_num(values) / opaque * 255).clip(0, 255).round().astype(np.uint8)


def _upright(stored: Values, orientation: int | None) -> Values:
    turn = _TURNS.get(orientation, lambda x: x)
    return Values(turn(stored.values), stored.alpha if stored.alpha is None else turn(stored.alpha))


# What the EXIF orientation asks for, of [..., H, W].
_ORIENTATION = 0x0112
_TURNS = {
    2: lambda x: x[..., ::-1],
    3: lambda x: x[..., ::-1, ::-1],
    4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2),
    6: lambda x: x[..., ::-1, :].swapaxes(-1, -2),
    7: lambda x: x[..., ::-1, ::-1].swapaxes(-1, -2),
    8: lambda x: x[..., ::-1].swapaxes(-1, -2),
}


def _read_tiff(file: Path, reading: Reading, wanted: Wanted) -> Sequence[Image.Image] | Values:
    """Pillow where it gives all that the file holds, tifffile elsewhere. Pages are frames, for a model of one channels.

    Axes that the file calls samples or channels are channels for every model.
    """
    beyond = _beyond_pillow(file)
    if not beyond:
        return _read_with_pillow(file, reading, wanted)
    if tifffile is None:
        raise DataError(f"it {beyond}, which needs the package tifffile: pip install 'mae_kernels[multiband]'")
    with tifffile.TiffFile(file) as tiff:
        series, *others = tiff.series
        # Overviews and masks repeat the picture; anything else would be cut away.
        stack = [series, *(s for s in others if not s.keyframe.subfiletype & 5)]
        if len(kinds := [*dict.fromkeys(map(_kind, stack))]) > 1:
            raise DataError(f"its pages are of different kinds: {kinds[0]} and {kinds[1]}")
        axes = "I" + series.axes  # of a stack of series, I for image
        if not {"Y", "X"} <= {*axes}:
            raise DataError(f"tifffile finds no rows and columns in its axes {series.axes!r}")
        sizes = (len(stack), *series.shape)
        rows, columns = axes.index("Y"), axes.index("X")
        height, width = sizes[rows], sizes[columns]
        reading.check_size(height, width)
        page = series.keyframe
        if page.photometric not in (0, 1, 2) and not (page.photometric == 6 and page.compression in (6, 7)):
            raise DataError(f"its photometric interpretation {_name(page.photometric)} is not known here")
        others = [i for i, axis in enumerate(axes) if axis not in "YX"]
        planes = [i for i in others if reading.frames == 1 or axes[i] in "SC"]
        frames = [i for i in others if i not in planes]
        if sum(sizes[i] > 1 for i in frames) > 1:
            raise DataError(f"more than one of its axes {series.axes!r} could be the frames")
        channels = math.prod(sizes[i] for i in planes)
        has_alpha = page.extrasamples in ((1,), (2,)) and reading.channels in (1, 3)
        reading.check_channels(channels - has_alpha)
        clip = reading.clip(math.prod(sizes[i] for i in frames), wanted.start)
        try:
            values = np.stack([s.asarray() for s in stack])
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise DataError(
                f"it {beyond}, and {_name(page.compression)} needs the package imagecodecs: "
                "pip install 'mae_kernels[multiband]'"
            ) from error
        values = values.transpose(*planes, *frames, rows, columns)
        values = values.reshape(channels, -1, height, width)[:, clip]
        if 1 < page.bitspersample < 8:
            values = values * np.uint8(255 // (2**page.bitspersample - 1))
        tags = {tag.code: tag.value for tag in page.tags}
        colours = _interpreted(values[: channels - has_alpha], tags)
        return _upright(Values(colours, _alpha(values[-1]) if has_alpha else None), tags.get(_ORIENTATION))


def _kind(series: "tifffile.TiffPageSeries") -> str:
    page = series.keyframe
    return f"{series.shape} {series.dtype} {_name(page.photometric)} {_name(page.compression)}"


def _name(code: int) -> str:
    """Of a number that TIFF defines, such as ``"LZW"``."""
    return getattr(code, "name", f"{code}")


# Tags of TIFFs.
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 254, 258, 262, 277, 284, 338, 339
_GDAL_NODATA = 42113
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # samples of each photometric interpretation


def _beyond_pillow(file: Path) -> str:
    """What Pillow would leave out of a TIFF, or cannot read; empty where it gives everything."""
    try:
        with _opened(file) as image:
            tags, mode = dict(image.tag_v2), image.mode
            for page in range(1, image.n_frames):
                image.seek(page)
                if not image.tag_v2.get(_SUBFILE, 0) & 5:  # neither an overview nor a mask
                    return "has more than one page"
    except UnidentifiedImageError:
        return "has pixels that Pillow does not know"
    samples, formats = tags.get(_SAMPLES, 1), tags.get(_SAMPLE_FORMAT, (1,))
    alphas = sum(extra in (1, 2) for extra in tags.get(_EXTRA_SAMPLES, ()))
    if alphas > 1 or samples != _COLOURS.get(tags.get(_PHOTOMETRIC), 1) + alphas:
        return f"has {samples} values a pixel that are not all colours"
    if not mode.startswith(("I", "F")) and any(f not in (1, 4) for f in formats):
        return "has signed values"
    if tags.get(_PLANAR) == 2 and max(tags.get(_BITS, (1,))) > 8:
        return "has planes of more than 8 bits"
    return ""


def _interpreted(values: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Numbers of a TIFF with black below white, and those masked that are, as GDAL writes it, no values."""
    with suppress(TypeError, ValueError), np.errstate(over="ignore"):
        values = np.ma.masked_where(values == float(tags.get(_GDAL_NODATA)), values, copy=False)
    if tags.get(_PHOTOMETRIC) == 0:
        return 1 - values if values.dtype.kind == "f" else ~values
    return values


def _read_numpy(file: Path, reading: Reading, wanted: Wanted) -> Values:
    """``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``, with T before H for a model of frames; its channels say which."""
    values = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray):
        with values as arrays:
            if len(arrays) != 1:
                raise DataError(f"it holds {counted(len(arrays), 'array')}, not one: {', '.join(arrays)}")
            (values,) = arrays.values()
    shape, sides = values.shape, 2 + (reading.frames > 1)
    if values.ndim == sides:
        if sides == 3 and shape[2] == 3:
            raise DataError(f"its shape is {shape}: it is one picture in colours, not {reading.frames} frames")
        values = values[None]
    elif values.ndim == sides + 1:
        counts = [reading.channels] + [c for c in (1, 3) if c != reading.channels and reading.channels in (1, 3)]
        axes = next(filter(None, ([a for a in (0, sides) if shape[a] == count] for count in counts)), [])
        if len(axes) > 1:
            raise DataError(f"its shape is {shape}: its first axis could be the channels, and its last one too")
        if not axes:
            raise DataError(
                f"its shape is {shape}: it has {shape[0]} or {shape[-1]} channels, and the model takes "
                f"{reading.channels}"
            )
        values = np.moveaxis(values, axes[0], 0)
    else:
        raise DataError(
            f"its shape is {shape}: it has {counted(values.ndim, 'axis', 'axes')}, not {sides} or {sides + 1}"
        )
    reading.check_size(*values.shape[-2:])
    reading.check_channels(len(values))
    values = values.reshape(len(values), -1, *values.shape[-2:])  # [C, T, H, W]
    return Values(values[:, reading.clip(values.shape[1], wanted.start)])


def _read_video(file: Path, reading: Reading, wanted: Wanted) -> list[Image.Image]:
    """Frames in the order in which they are shown; none before the last key frame that is needed is decoded."""
    if av is None:
        raise DataError(f"it is a video, which needs {_VIDEO}")
    with av.open(file) as container:
        if not container.streams.video:
            raise DataError("it holds no video")
        stream = container.streams.video[0]
        reading.check_size(stream.height, stream.width)
        times = sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)
        chosen = times[reading.clip(len(times), wanted.start)]
        container.seek(chosen[0], stream=stream)
        frames = {}
        for frame in container.decode(stream):
            if frame.pts in chosen:
                frames[frame.pts] = frame.to_image().rotate(frame.rotation, expand=True)
            if len(frames) == len(chosen):
                return [frames[time] for time in chosen]
        raise DataError(f"only {len(frames)} of {counted(len(chosen), 'frame')} can be decoded")


def _read_wav(file: Path, reading: Reading, wanted: Wanted) -> Values:
    rate, samples = wavfile.read(file)
    return _heard(len(samples), rate, lambda begin, count: samples[begin : begin + count], reading, wanted)


def _read_sound(file: Path, reading: Reading, wanted: Wanted) -> Values:
    if soundfile is None:
        raise DataError(f"it is sound, which needs {_AUDIO}")
    with soundfile.SoundFile(file) as sound:

        def read(begin: int, count: int) -> np.ndarray:
            sound.seek(begin)
            return sound.read(count)

        return _heard(sound.frames, sound.samplerate, read, reading, wanted)


def _heard(count: int, rate: int, read: Callable[[int, int], np.ndarray], reading: Reading, wanted: Wanted) -> Values:
    """The spectrogram of as many samples as the model has columns for, ``read`` giving those from one place on."""
    if (reading.channels, reading.frames) != (1, 1):
        raise DataError("it is sound, which takes a model of one channel and no frames")
    *_, bands, columns = reading.image_size
    if count * RATE < WINDOW * rate:
        raise DataError(f"it has {counted(count, 'sample')}, fewer than a window of {WINDOW / RATE:g} s")
    place = wanted.start(max((count * RATE // rate - WINDOW) // HOP + 1 - columns, 0) + 1)
    length = (columns - 1) * HOP + WINDOW
    samples = read(place * HOP * rate // RATE, -(-length * rate // RATE))
    levels = spectrogram(mono(samples, rate), bands, columns)
    return Values((levels if reading.value_range else below_loudest(levels))[None], is_sound=True)


def _pillow_suffixes() -> set[str]:
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


_NOT_WHOLE = {"MPEG": "knows no more than the size", "FITS": "reads one plane, and not the scale,"}
_LIBRARIES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}

READERS = (
    Reader(_read_numpy, re.compile(rb"\x93NUMPY|PK\x03\x04"), lambda: {".npy", ".npz"}),
    Reader(_read_tiff, re.compile(rb"II[*+]\0|MM\0[*+]"), lambda: {".tif", ".tiff"}),
    Reader(_read_wav, re.compile(rb"RIFF....WAVE", re.DOTALL), lambda: {".wav"}),
    Reader(
        _read_sound,
        re.compile(rb"fLaC|OggS|ID3|\xff[\xf2\xf3\xfa\xfb]"),
        lambda: {".flac", ".ogg", ".mp3"},
        lambda: "" if soundfile else _AUDIO,
    ),
    Reader(
        _read_video,
        # AVIF and HEIF begin as an MP4 does.
        re.compile(rb"....(ftyp(?!avi[fs]|hei|mif1|msf1)|moov|mdat|wide|free)|RIFF....AVI |\x1aE\xdf\xa3", re.DOTALL),
        lambda: {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"},
        lambda: "" if av else _VIDEO,
    ),
    Reader(_read_with_pillow, re.compile(b""), _pillow_suffixes),  # the last one: it takes every file
)


@cache
def suffixes() -> frozenset[str]:
    """Of the files that are looked for, in small letters."""
    return frozenset().union(*(reader.suffixes() for reader in READERS if not reader.missing()))


def is_sound(file: Path) -> bool:
    """Whether the file would be seen as a spectrogram, by its suffix."""
    return any(file.suffix.lower() in r.suffixes() for r in READERS if r.read in (_read_wav, _read_sound))


def missing_for(suffix: str) -> str:
    """The package that files of this suffix wait for, and how to install it; empty where there is none."""
    return next((reader.missing() for reader in READERS if suffix in reader.suffixes()), "")
