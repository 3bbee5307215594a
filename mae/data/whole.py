"""Pictures as they are looked at and evaluated: the central part of each, nothing random."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae.data.crops import Collated, Sample, arranged, spread
from mae.data.errors import DataWarning, Unreadable
from mae.data.loader import Batch
from mae.data.notes import Notes, none_readable
from mae.data.pictures import Picture, resize_and_crop, to_tensor
from mae.data.readers import Reading
from mae.data.sources import Source
from mae.data.workers import ignore_signals, loaded


def read_pictures(source: Source, reading: Reading, most: int | None = None) -> Iterator[tuple[Tensor, int]]:
    """The central part of each picture, ``[C, H, W]`` or ``[C, T, H, W]`` uint8, and its number.

    With most they are at most that many, spread over all of them: the first readable one of each of as many equal
    parts, and for a part without any a further one of another part. What cannot be read is passed over; in the end a
    :class:`DataWarning` counts it.

    Raises:
        Unreadable: none of the files can be read.
        Unreachable: a part of the source cannot be had.
    """
    most = len(source) if most is None else most
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    borders = [len(source) * i // min(most, len(source)) for i in range(min(most, len(source)) + 1)]
    parts = [iter(range(*ends)) for ends in pairwise(borders)]
    refuse_unreadable(source, reading)
    problems, notes, taken, tried = [], Notes(source), 0, 0
    for part in (*parts, rest := chain(*parts)):
        for index in part:
            if taken == most:
                break
            tried += 1
            try:
                picture = source.read(index, reading)
            except Unreadable as error:
                problems.append(str(error))
                continue
            if picture.note:
                notes.add([(index, picture.note)])
            taken += 1
            yield _central(picture, reading), index
            if part is not rest:
                break
    notes.warn()
    warn_unreadable(problems, tried)


class WholePictures(Dataset[Any]):
    """The central part of each picture of a source, by its number."""

    def __init__(self, source: Source, reading: Reading) -> None:
        self.source, self.reading = source, reading

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            picture = self.source.read(index, self.reading)
        except Unreadable as error:
            return Sample(None, False, [str(error)], index)
        return Sample(_central(picture, self.reading), False, [], index, picture.note)

    @staticmethod
    def collate(samples: list[Sample]) -> Collated:
        read = [sample for sample in samples if sample.pixels is not None]
        return Collated(
            torch.stack([sample.pixels for sample in read if sample.pixels is not None]) if read else None,
            [sample.index for sample in read],
            [problem for sample in samples for problem in sample.problems],
            [(sample.index, sample.note) for sample in read if sample.note],
        )


def whole_batches(
    source: Source,
    reading: Reading,
    batch_size: int,
    *,
    numbers: Sequence[int] | None = None,
    workers: int = 0,
    warn: bool = True,
    problems: list[str] | None = None,
) -> Iterator[Batch]:
    """Batches of the central parts of the pictures of these numbers, all of them for None, in that order.

    What cannot be read is missing; in the end a :class:`DataWarning` counts it, where warn is True. A list of problems
    that is given gets it instead, to be said elsewhere.

    Raises:
        Unreadable: none of the files can be read, which is found out before the first batch.
        Unreachable: a part of the source cannot be had.
    """
    numbers = range(len(source)) if numbers is None else numbers
    refuse_unreadable(source, reading)
    loader = DataLoader(
        WholePictures(source, reading),
        batch_size,
        sampler=numbers,
        num_workers=0 if source.blocks is not None else workers,  # a worker would read a stream's row groups again
        collate_fn=WholePictures.collate,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the global one is left alone
    )
    found, notes = [], Notes(source)
    for images, places, unread, noted in loaded(loader):
        found += unread
        notes.add(noted)
        if images is not None:
            yield Batch(images, torch.tensor(places))
    if warn:
        notes.warn()
    if problems is not None:
        problems += found
    elif warn:
        warn_unreadable(found, len(numbers))


def _central(picture: Picture, reading: Reading) -> Tensor:
    height, width = reading.image_size[-2:]
    return arranged(to_tensor(resize_and_crop(picture, (height, width))), reading.image_size)


def warn_unreadable(problems: list[str], tried: int) -> None:
    """A :class:`DataWarning` that counts them, where there are any."""
    if problems:
        words = f"{len(problems)} of {tried} files cannot be read; first: {problems[0]}"
        warnings.warn(words, DataWarning, stacklevel=3)


def refuse_unreadable(source: Source, reading: Reading) -> None:
    """Raise :class:`Unreadable` at once, and not when the last of many files has been tried."""
    problems = []
    for index in spread(0, len(source)):
        try:
            source.read(index, reading)
            return
        except Unreadable as error:
            problems.append(str(error))
    raise Unreadable(none_readable(problems, len(source)))
