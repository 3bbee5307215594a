"""Images made small once, in Parquet files that the library datasets loads: training has less to decode."""

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae.data.errors import DataError, Unreadable, printable
from mae.data.hugging_face import import_datasets
from mae.data.notes import Notes
from mae.data.pictures import Picture
from mae.data.readers import Reading, Wanted
from mae.data.sources import ImageFiles, Source
from mae.data.workers import ignore_signals, loaded

_SHARD = 128 << 20  # bytes of images in a file, of which several copies are in memory while it is written
_ROW_GROUP = 4 << 20  # bytes of images that are read together; a stream mixes some row groups at a time
_TOGETHER = 16  # images that a worker hands over at once
_SHARDS = "data/train-*-of-*.parquet"  # where datasets looks for the split train


@dataclass(frozen=True)
class Packing:
    """How an image is stored."""

    short_side: int = 256
    """Pixels that the shorter side is brought to where it is longer."""
    format: Literal["jpeg", "raw"] = "jpeg"
    """raw is BMP: every value as it is, known to whatever shows images, and decoded ten times as fast as a PNG that is
    not compressed, whose checksums take their time."""
    quality: int = 92
    """Of JPEGs."""

    def encoded(self, picture: Picture) -> bytes:
        image = Image.fromarray(np.asarray(picture))
        factor = self.short_side / min(image.size)
        if factor < 1:
            width, height = (max(self.short_side, round(side * factor)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "BMP" if self.format == "raw" else "JPEG", quality=self.quality)  # which BMP has none of
        return stream.getvalue()

    @property
    def wanted(self) -> Wanted:
        """Twice the pixels in each direction, which resizing then has to work with."""
        return Wanted(lambda height, width: max(1, min(height, width) // (2 * self.short_side)))


class Packed(NamedTuple):
    """What was written."""

    images: int
    files: int
    size: int  # bytes
    problems: list[str]  # of the images that were passed over


def pack(
    source: Source,
    out: Path,
    packing: Packing,
    reading: Reading,
    *,
    labels: tuple[Sequence[int], list[str]] | None = None,
    workers: int = 0,
    overwrite: bool = False,
) -> Packed:
    """Columns ``image``, ``path``, and with labels, a number for each image and the names of all, ``label``.

    The folder is there when all of it is written, and not before.

    Args:
        reading: its channels are 1 or 3, and it has no frames.

    Raises:
        DataError: the folder holds files, another process packs into it, or no image can be read.
    """
    datasets = import_datasets("pack")
    refuse_filled(out, overwrite)
    columns = {"image": datasets.Image(), "path": datasets.Value("string")}
    features = datasets.Features(columns | ({"label": datasets.ClassLabel(names=labels[1])} if labels else {}))
    prefix = source.prefix if isinstance(source, ImageFiles) else ""
    problems, notes, held, images, files = [], Notes(source), 0, 0, []
    rows: list[dict[str, Any]] = []
    with _staged(out) as stage, _no_progress_bars(datasets):

        def write() -> None:
            files.append(stage / f"{len(files)}.parquet")
            columns = {name: [row[name] for row in rows] for name in features}
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(files[-1], batch_size=max(1, len(rows) * _ROW_GROUP // held))
            rows.clear()

        for index, (content, said) in enumerate(_encoded(_Encoded(source, packing, reading), workers)):
            if content is None:
                problems.append(said)
                continue
            if said:
                notes.add([(index, said)])
            path = os.fsencode(source.name(index).removeprefix(prefix)).decode("utf-8", "backslashreplace")
            rows.append({"image": {"bytes": content, "path": path}, "path": path})
            if labels:
                rows[-1]["label"] = labels[0][index]
            images, held = images + 1, held + len(content)
            if held >= _SHARD:
                write()
                held = 0
        if rows:
            write()
        if not files:
            raise DataError(f"no image can be read; first: {problems[0]}")
        size = sum(file.stat().st_size for file in files)
        (stage / "data").mkdir()
        for i, file in enumerate(files):
            file.rename(stage / "data" / f"train-{i:05}-of-{len(files):05}.parquet")
    notes.warn()
    return Packed(images, len(files), size, problems)


def refuse_filled(out: Path, overwrite: bool) -> None:
    """Raise :class:`DataError` where files would be overwritten unasked, or others than those of a packed dataset."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{printable(out)} is a file, not a folder")
    found = {path for path in out.rglob("*") if not path.is_dir()}
    if found and not overwrite:
        raise DataError(f"{printable(out)} holds files already; choose another --out, or add --overwrite")
    if others := found - set(out.glob(_SHARDS)):
        raise DataError(
            f"{printable(out)} holds other files than a packed dataset, such as {printable(min(others))}; choose "
            "another --out"
        )


class _Encoded(Dataset[Any]):
    """The bytes of each image and what :class:`Notes` says of it, or None and why there are none."""

    def __init__(self, source: Source, packing: Packing, reading: Reading) -> None:
        self._source, self._packing, self._reading = source, packing, reading

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes | None, str]:
        try:
            picture = self._source.read(index, self._reading, self._packing.wanted)
        except Unreadable as error:
            return None, str(error)
        name = printable(self._source.name(index))
        if picture.is_sound:
            return None, f"cannot pack {name}: it is sound"
        try:
            return self._packing.encoded(picture), picture.note
        except OSError as error:  # a side that is longer than the format knows
            return None, f"cannot pack {name}: {error}"


class _Batch(NamedTuple):
    """As a tensor, which is in shared memory: from a worker that is killed within a long message there is no end."""

    contents: Tensor  # one after another
    lengths: list[int | None]
    said: list[str]

    @classmethod
    def of(cls, images: list[tuple[bytes | None, str]]) -> "_Batch":
        contents, said = zip(*images, strict=True)
        joined = np.frombuffer(b"".join(filter(None, contents)), np.uint8)
        return cls(torch.from_numpy(joined.copy()), [x if x is None else len(x) for x in contents], list(said))

    def each(self) -> Iterator[tuple[bytes | None, str]]:
        begin, contents = 0, self.contents.numpy()
        for length, said in zip(self.lengths, self.said, strict=True):
            yield None if length is None else contents[begin : begin + length].tobytes(), said
            begin += length or 0


def _encoded(images: _Encoded, workers: int) -> Iterator[tuple[bytes | None, str]]:
    """In order, a few batches ahead of whoever takes them."""
    loader = DataLoader(images, _TOGETHER, num_workers=workers, collate_fn=_Batch.of, worker_init_fn=ignore_signals)
    with tqdm(total=len(images), unit="image") as bar:
        for batch in loaded(loader):
            yield from batch.each()
            bar.update(len(batch.said))


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside out that takes its place when the body has ended, and is gone when it has failed.

    Where the process is killed it stays until out is packed again.
    """
    stage, old = (out.parent / f".{out.name}.{word}" for word in ("packing", "replaced"))
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(stage.with_name(f"{stage.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"another process packs into {printable(out)}") from None
    try:
        for left in (stage, old):
            shutil.rmtree(left, ignore_errors=True)
        stage.mkdir()
        yield stage
        if out.exists():
            out.rename(old)
        stage.rename(out)
    finally:
        for left in (stage, old):
            shutil.rmtree(left, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    """One for each file would interrupt the one of all images."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
