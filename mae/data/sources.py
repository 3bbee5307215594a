"""Where pictures come from: folders of images, whatever else is in them, and datasets."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from mae.data.errors import DataError, DataWarning, counted, printable
from mae.data.hugging_face import open_dataset
from mae.data.order import Blocks, laid_out
from mae.data.pictures import Picture, read_image
from mae.data.randomness import permutation
from mae.data.readers import Reading, Stored, Wanted, missing_for, suffixes

_LEAST_BLOCKS = 64  # of a stream that pictures are held out from
_MOST_KINDS = 8  # named in a line; further ones are summed up
_DATASETS = {".parquet", ".arrow"}
_IMAGE, _FOLDER, _NO_SUFFIX, _BROKEN_LINK, _SPECIAL, _LOCKED = "image", "folder", "none", "link", "special", "locked"
_WORDS = {  # of what has no suffix to be called by: one, and more than one
    _NO_SUFFIX: ("file without a suffix", "files without a suffix"),
    _BROKEN_LINK: ("broken link", "broken links"),
    _SPECIAL: ("special file (a FIFO, socket or device)", "special files (FIFOs, sockets or devices)"),
    _LOCKED: ("folder that cannot be opened", "folders that cannot be opened"),
    _IMAGE: ("image beside the sub-folders", "images beside the sub-folders"),
}


class Source(Protocol):
    """Pictures by their numbers, from 0 on.

    A source with blocks is streamed: ``contents(steps)`` yields, for the numbers of each step, the files that hold
    these pictures, None for one without a file, and keeps the blocks of the step before open.
    """

    @property
    def blocks(self) -> Blocks | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person finds the picture by."""

    def read(self, index: int, reading: Reading, wanted: Wanted | None = None) -> Picture:
        """The picture, as :func:`mae.data.read_image` reads it.

        Raises:
            Unreadable: it cannot.
        """

    def fingerprint(self) -> str:
        """The same for the same pictures in the same order, so that a run is resumed on no others."""


@dataclass(frozen=True)
class ImageFiles:
    """Files, in the order given; those below root keep their fingerprint when it is moved."""

    files: list[Path]
    root: Path | None = None
    blocks: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def prefix(self) -> str:
        """What names of files below root begin with."""
        return "" if self.root is None else os.path.join(self.root, "")

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int, reading: Reading, wanted: Wanted | None = None) -> Picture:
        return read_image(self.files[index], reading, wanted)

    def fingerprint(self) -> str:
        """Of the names alone: opening a million files would take minutes."""
        names = "\0".join([str(file).removeprefix(self.prefix) for file in self.files])
        return hashlib.sha256(os.fsencode(names)).hexdigest()[:16]


@dataclass(frozen=True)
class Joined:
    """Sources one after another."""

    parts: Sequence[Source]
    blocks: ClassVar[None] = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def name(self, index: int) -> str:
        part, index = self._place(index)
        return part.name(index)

    def read(self, index: int, reading: Reading, wanted: Wanted | None = None) -> Picture:
        part, index = self._place(index)
        return part.read(index, reading, wanted)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()[:16]

    def _place(self, index: int) -> tuple[Source, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(f"there are only {len(self)} pictures")


def open_source(data: str | Path) -> Source:
    """What ``--data`` names: a folder, which is searched, or ``hf:`` and what :func:`open_dataset` takes.

    Raises:
        DataError: there is none of that name, or no image in it.
    """
    if str(data).startswith("hf:"):
        return open_dataset(str(data).removeprefix("hf:"))
    return ImageFiles(find_images(data), Path(data))


@dataclass(frozen=True)
class Part:
    """Some pictures of a source, by their numbers there, which rise."""

    source: Source
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def blocks(self) -> Blocks | None:
        """Those of the source, with fewer pictures."""
        if self.source.blocks is None:
            return None
        borders = np.searchsorted(self.numbers, [0, *np.cumsum(self.source.blocks.sizes)])
        return self.source.blocks._replace(sizes=np.diff(borders))

    def contents(self, steps: Iterable[list[int]]) -> Iterator[list[Stored | None]]:
        source: Any = self.source  # one with blocks has contents too
        return source.contents([self.numbers[i] for i in indices] for indices in steps)

    def name(self, index: int) -> str:
        return self.source.name(self.numbers[index])

    def read(self, index: int, reading: Reading, wanted: Wanted | None = None) -> Picture:
        return self.source.read(self.numbers[index], reading, wanted)

    def fingerprint(self) -> str:
        numbers = np.asarray(self.numbers, np.int64).tobytes()
        return hashlib.sha256(self.source.fingerprint().encode() + numbers).hexdigest()[:16]


def held_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Those that are left to train on, and a random count of others, of a stream from few blocks."""
    if source.blocks is None:
        order = permutation("held out", seed, (0, 0), len(source))
    else:  # neighbours are often alike, so not from the fewest
        sizes = source.blocks.sizes
        blocks = permutation("held out", seed, (0, 0), len(sizes))
        enough = max(_LEAST_BLOCKS, 1 + int(np.searchsorted(np.cumsum(sizes[blocks]), count)))
        order, _ = laid_out(blocks, sizes)
        among = int(sizes[blocks[:enough]].sum())
        order[:among] = order[permutation("held out", seed, (1, 0), among)]
    return Part(source, sorted(order[count:].tolist())), Part(source, sorted(order[:count].tolist()))


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below folder, in order of their paths; symbolic links are followed, each folder read once.

    Hidden files and folders are left out. So is what has no suffix of an image, is no regular file, or cannot be
    opened: a :class:`DataWarning` counts it.

    Raises:
        DataError: there is no folder, or no image in it.
    """
    folder, left_out = Path(folder), Counter()
    if folder.is_file():
        hint = f"; hf:{printable(folder)} reads it" if folder.suffix.lower() in _DATASETS else ""
        raise DataError(f"{printable(folder)} is a file, not a folder{hint}")
    if not folder.is_dir():
        raise DataError(f"there is no folder {printable(folder)}")
    files = list(_walk(folder, left_out))
    if not files:
        hint = f"; hf:{printable(folder)} reads datasets" if _DATASETS & left_out.keys() else ""
        raise DataError(f"found no image below {printable(folder)}; {_looked_for(left_out)}{hint}")
    _warn(folder, left_out)
    return files


def find_labelled_images(folder: str | Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of a folder with one sub-folder per class, which are not hidden.

    Raises:
        DataError: there is no class, or some of them hold no image.
    """
    folder, left_out = Path(folder), Counter()
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != ".") if folder.is_dir() else []
    if not classes:
        what = "holds no sub-folder" if folder.is_dir() else "is no folder"
        raise DataError(f"{printable(folder)} must hold one sub-folder of images per class, and {what}")
    with os.scandir(folder) as beside:
        left_out.update(_kind(x, suffixes()) for x in beside if x.name[0] != "." and x.name not in classes)
    found = [list(_walk(folder / name, left_out)) for name in classes]
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        names = ", ".join(map(printable, empty))
        raise DataError(f"no image in these sub-folders of {printable(folder)}: {names}; {_looked_for(left_out)}")
    _warn(folder, left_out)
    labels = [label for label, files in enumerate(found) for _ in files]
    return [file for files in found for file in files], labels, classes


def _walk(folder: Path, left_out: Counter[Any]) -> Iterator[Path]:
    known, seen = suffixes(), set()

    def entries(path: str) -> Iterator[Path]:
        try:
            place = os.stat(path)
            with os.scandir(path) as listing:
                inside = sorted((e for e in listing if e.name[0] != "."), key=lambda entry: entry.name)
        except OSError:
            left_out[_LOCKED] += 1
            return
        if (place.st_dev, place.st_ino) in seen:  # a link back up would never end
            return
        seen.add((place.st_dev, place.st_ino))
        for entry in inside:
            kind = _kind(entry, known)
            if kind == _FOLDER:
                yield from entries(entry.path)
            elif kind == _IMAGE:
                yield Path(entry.path)
            else:
                left_out[kind] += 1

    return entries(str(folder))


def _kind(entry: os.DirEntry[str], known: frozenset[str]) -> str:
    """An image, a folder, or else the suffix or kind by which it is counted."""
    try:
        if entry.is_file():
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in known:
                return _IMAGE
            return printable(suffix)[:20] if suffix else _NO_SUFFIX
        if entry.is_dir():
            return _FOLDER
    except OSError:  # links that lead in a circle
        pass
    return _BROKEN_LINK if entry.is_symlink() and not os.path.exists(entry.path) else _SPECIAL


def _looked_for(left_out: Counter[Any]) -> str:
    examples = [s for s in (".jpg", ".png", ".webp", ".avif", ".jp2", ".tif", ".npy") if s in suffixes()]
    looked = f"looked for {', '.join(examples)} and {len(suffixes()) - len(examples)} other suffixes"
    return f"{looked}; {_listed(left_out)}" if left_out else looked


def _listed(left_out: Counter[Any]) -> str:
    kinds = sorted(left_out.items(), key=lambda kind: (kind[0] in _WORDS, -kind[1], kind[0]))
    parts = [counted(count, *_WORDS.get(kind, (f"{kind} file",))) for kind, count in kinds[:_MOST_KINDS]]
    if rest := kinds[_MOST_KINDS:]:
        parts.append(f"{sum(count for _, count in rest)} of {counted(len(rest), 'other kind')}")
    missing = sorted({*map(missing_for, left_out)} - {""})
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return "; ".join([f"left out {listed}", *(f"some need {package}" for package in missing)])


def _warn(folder: Path, left_out: Counter[Any]) -> None:
    if left_out:
        warnings.warn(f"{printable(folder)}: {_listed(left_out)}", DataWarning, stacklevel=3)
