"""Files as arrays, with every value that they hold: what Pillow would cut away is read otherwise, or refused."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae.data.readers import arrays, jpeg, pillow, sound, tiff, video
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored
from mae.data.readers.values import Values

# Without a handler Python prints what these say about damaged files.
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


class Reader(NamedTuple):
    """Reads one kind of files; another kind is another entry of READERS.

    ``read(file, reading, wanted)`` gives the pixels as they are stored: for each frame an image of 8 bits or an array
    ``[H, W]`` or ``[H, W, 3]`` of such, or :class:`Values`. It asks ``reading`` about size and channels before it
    decodes, where it can, and may raise anything.
    """

    read: Callable[[Stored, Reading, Wanted], Sequence[Image.Image | np.ndarray] | Values]
    magic: re.Pattern[bytes]  # of the first bytes of such files
    suffixes: Callable[[], set[str]]
    missing: Callable[[], str] = lambda: ""  # the package that it waits for, and how to install it


READERS = (
    Reader(arrays.read, re.compile(rb"\x93NUMPY|PK\x03\x04"), lambda: {".npy", ".npz"}),
    Reader(tiff.read, re.compile(rb"II[*+]\0|MM\0[*+]"), lambda: {".tif", ".tiff"}),
    Reader(sound.read_wav, re.compile(rb"RIFF....WAVE", re.DOTALL), lambda: {".wav"}),
    Reader(
        sound.read,
        re.compile(rb"fLaC|OggS|ID3|\xff[\xf2\xf3\xfa\xfb]"),
        lambda: {".flac", ".ogg", ".mp3"},
        sound.missing,
    ),
    Reader(
        video.read,
        # AVIF and HEIF begin as an MP4 does.
        re.compile(rb"....(ftyp(?!avi[fs]|hei|mif1|msf1)|moov|mdat|wide|free)|RIFF....AVI |\x1aE\xdf\xa3", re.DOTALL),
        lambda: {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"},
        video.missing,
    ),
    Reader(jpeg.read, re.compile(rb"\xff\xd8\xff"), set),  # whose suffixes are among those of Pillow
    Reader(pillow.read, re.compile(b""), pillow.suffixes),  # the last one: it takes every file
)


@cache
def suffixes() -> frozenset[str]:
    """Of the files that are looked for, in small letters."""
    return frozenset().union(*(reader.suffixes() for reader in READERS if not reader.missing()))


def is_sound(file: Path) -> bool:
    """Whether the file would be seen as a spectrogram, by its suffix."""
    return any(file.suffix.lower() in r.suffixes() for r in READERS if r.read in (sound.read_wav, sound.read))


def missing_for(suffix: str) -> str:
    """The package that files of this suffix wait for, and how to install it; empty where there is none."""
    return next((reader.missing() for reader in READERS if suffix in reader.suffixes()), "")
