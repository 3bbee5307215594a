"""Pictures of known classes: a folder with a sub-folder for each, or a dataset with a column of labels."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mae.data.errors import DataError, printable
from mae.data.hugging_face import open_labelled_dataset
from mae.data.sources import ImageFiles, Source, find_labelled_images

_MOST_NAMED = 8  # classes, in a line


@dataclass(frozen=True)
class Labelled:
    """Pictures and what they show."""

    source: Source
    labels: np.ndarray  # [pictures] int64, places in classes
    classes: tuple[str, ...]
    where: str  # as it was asked for

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """Of the labels and the names of the classes, so that a run is resumed on no others."""
        names = "\0".join(self.classes).encode(errors="surrogateescape")
        return hashlib.sha256(self.labels.astype(np.int64).tobytes() + names).hexdigest()[:16]


def open_labelled(data: str | Path) -> Labelled:
    """A folder with one sub-folder of images per class, or ``hf:`` and a dataset with a column of labels.

    Raises:
        DataError: there is none of that name, there are fewer than two classes, or one without a picture.
    """
    if str(data).startswith("hf:"):
        rows, labels, classes = open_labelled_dataset(str(data).removeprefix("hf:"))
        found = Labelled(rows, labels, classes, str(data))
        if missing := [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]:
            raise DataError(f"no picture of {_listed(missing)} in {printable(data)}")
    else:
        files, labels, classes = find_labelled_images(data)
        found = Labelled(ImageFiles(files, Path(data)), np.array(labels), tuple(classes), str(data))
    if len(found.classes) < 2:
        raise DataError(f"{printable(data)} holds one class alone, {_listed(found.classes)}, and two are needed")
    return found


def open_train_and_test(data: str | Path, test: str | Path) -> tuple[Labelled, Labelled]:
    """Both, of the same classes, which those of data number.

    Raises:
        DataError: as of :func:`open_labelled`, or the classes differ.
    """
    train, tested = open_labelled(data), open_labelled(test)
    if sorted(train.classes) == sorted(tested.classes):  # folders are in the order of their names, datasets in theirs
        places = np.array([train.classes.index(name) for name in tested.classes])
        return train, replace(tested, labels=places[tested.labels], classes=train.classes)
    words = [
        f"only {printable(one.where)} holds {_listed(more)}"
        for one, other in ((train, tested), (tested, train))
        if (more := sorted({*one.classes} - {*other.classes}))
    ]
    raise DataError(f"{printable(data)} and {printable(test)} do not hold the same classes: {'; '.join(words)}")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(printable, names[:_MOST_NAMED])) + more
