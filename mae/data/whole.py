"""Pictures as they are looked at and evaluated: the central part of each, nothing random."""

import warnings
from collections.abc import Iterator
from itertools import chain, pairwise

from torch import Tensor

from mae.data.crops import arranged, spread
from mae.data.errors import DataWarning, Unreadable
from mae.data.notes import Notes, none_readable
from mae.data.pictures import resize_and_crop, to_tensor
from mae.data.readers import Reading
from mae.data.sources import Source


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
            planes = to_tensor(resize_and_crop(picture, reading.image_size[-2:]))
            yield arranged(planes, reading.image_size), index
            if part is not rest:
                break
    notes.warn()
    if problems:
        warnings.warn(
            f"{len(problems)} of {tried} files cannot be read; first: {problems[0]}", DataWarning, stacklevel=2
        )


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
