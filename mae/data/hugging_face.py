"""Datasets of Hugging Face: their rows hold files, which are read as those of a folder are."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae.data.errors import DataError, printable
from mae.data.pictures import Picture, read_image
from mae.data.readers import Reading, Stored, Wanted

if TYPE_CHECKING:
    import datasets

_MOST_HASHED = 64  # rows, spread over all of them, that the fingerprint looks at
_NO_SCRIPTS = 4  # the version of datasets from which on it runs none


@dataclass(frozen=True)
class Rows:
    """Files in one column of a dataset, as they are stored there."""

    table: "datasets.Dataset"
    column: str
    where: str  # as it was asked for

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        """With the path that the row says, last, so that its suffix is that of the name."""
        path = self._held(index)[1]
        return f"{self._row(index)}, {path}" if path else self._row(index)

    def read(self, index: int, reading: Reading, wanted: Wanted | None = None) -> Picture:
        content, path = self._held(index)
        if content is None and not path:
            raise DataError(f"cannot read {printable(self._row(index))}: it holds no file")
        held = Path(path) if content is None else content
        return read_image(Stored(held, f"{self._row(index)}, {path}" if path else self._row(index)), reading, wanted)

    def fingerprint(self) -> str:
        """Of the number of rows and of what 64 of them hold: the same wherever the dataset lies and was cached."""
        count, digest = len(self), hashlib.sha256()
        digest.update(str(count).encode())
        for i in range(looked_at := min(count, _MOST_HASHED)):
            content, path = self._held(count * i // looked_at)
            digest.update(b"\0" + (Path(path or "").name.encode() if content is None else content))
        return digest.hexdigest()[:16]

    def _row(self, index: int) -> str:
        return f"row {index} of {self.where}"

    def _held(self, index: int) -> tuple[bytes | None, str | None]:
        """The bytes of a file, or where it lies."""
        try:
            held = self.table[int(index)][self.column]
        except Exception as error:  # damaged files of Arrow
            raise DataError(f"cannot read {printable(self._row(index))}: {_reason(error)}") from error
        return (held["bytes"], held.get("path")) if isinstance(held, dict) else (held, None)


def open_dataset(name: str) -> Rows:
    """A dataset of the hub or of this disk: ``NAME``, ``NAME:SPLIT``, ``NAME:SPLIT:column=COLUMN:config=CONFIG``.

    NAME is that of the hub, a folder that ``save_to_disk`` or anybody else has written, or a Parquet or Arrow file. The
    split is train by default, and may be a part of it such as ``train[:1000]``. The column is the one of images, else
    of videos or sounds, else of files as bytes. No code of a dataset is ever run.

    Raises:
        DataError: there is no such dataset, split or column, or several columns hold files.
    """
    where = f"hf:{name}"
    place, *options = [name] if Path(name).exists() else re.split(r":(?![^\[]*\])", name)
    chosen = dict(option.split("=", 1) if "=" in option else ("split", option) for option in options)
    if unknown := chosen.keys() - {"split", "column", "config"}:
        raise DataError(f"{printable(where)}: {min(unknown)}= is neither split= nor column= nor config=")
    datasets = import_datasets(where)
    try:
        table = _load(datasets, place, chosen.get("split"), chosen.get("config"))
    except DataError:
        raise
    except Exception as error:  # of Arrow, of the hub, of the network, and of datasets itself
        script = next(iter(sorted(Path(place).glob("*.py"))), None) if Path(place).is_dir() else None
        reason = f"it holds the script {script.name}, and scripts are never run" if script else _reason(error)
        raise DataError(f"cannot open {printable(where)}: {printable(reason)}") from error
    column = chosen.get("column") or _column(datasets, table.features, where)
    if column not in table.column_names:
        names = ", ".join(map(printable, table.column_names))
        raise DataError(f"{printable(where)} has no column {printable(column)}, but {names}")
    table = table.with_format(None).select_columns([column])
    if isinstance(feature := table.features[column], (datasets.Image, datasets.Audio, datasets.Video)):
        table = table.cast_column(column, type(feature)(decode=False))
    elif not _holds_bytes(feature):
        raise DataError(f"column {printable(column)} of {printable(where)} holds no files")
    return Rows(table, column, where)


def import_datasets(who: str) -> Any:
    """The package, which takes a second to import, for whoever needs it."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{printable(who)} needs the package datasets: pip install 'mae_kernels[datasets]'") from None
    if int(datasets.__version__.split(".")[0]) < _NO_SCRIPTS:
        raise DataError(f"datasets {datasets.__version__} may run scripts; only from {_NO_SCRIPTS} on there are none")
    return datasets


def _load(datasets: Any, place: str, split: str | None, config: str | None) -> "datasets.Dataset":
    path = Path(place)
    if path.is_file():
        kind = path.suffix.lower().removeprefix(".")
        if kind not in ("parquet", "arrow"):
            raise DataError(f"{printable(path)} is neither a folder nor a .parquet or .arrow file")
        return datasets.load_dataset(kind, data_files=str(path), split=split or "train")
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        if not path.exists() and (place.count("/") > 1 or place.startswith((".", "/", "~"))):
            raise DataError(f"there is no file or folder {printable(path)}")
        return datasets.load_dataset(place, config, split=split or "train")
    saved = datasets.load_from_disk(place)
    if isinstance(saved, datasets.Dataset):
        if split is not None:
            raise DataError(f"{printable(path)} holds one dataset without splits, so none is {printable(split)}")
        return saved
    if (split or "train") not in saved:
        names = ", ".join(map(printable, saved))
        raise DataError(f"{printable(path)} holds no split {printable(split or 'train')}, but {names}")
    return saved[split or "train"]


def _column(datasets: Any, features: dict[str, Any], where: str) -> str:
    """The only one of the first kind of which there is any."""
    kinds = (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, datasets.Audio | datasets.Video),
        _holds_bytes,
    )
    for is_one in kinds:
        names = [name for name, feature in features.items() if is_one(feature)]
        if len(names) > 1:
            raise DataError(
                f"{printable(where)} has several columns of files: {', '.join(map(printable, names))}; choose one "
                f"with {printable(where)}:column={printable(names[0])}"
            )
        if names:
            return names[0]
    raise DataError(f"{printable(where)} has no column of images, but {', '.join(map(printable, features))}")


def _holds_bytes(feature: Any) -> bool:
    """Whether it is a file without a type that says so, as most Parquet files that datasets did not write have it."""
    held = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(held, "dtype", "") in ("binary", "large_binary")


def _reason(error: Exception) -> str:
    error = error.__cause__ or error  # datasets says no more than that an error has occurred
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
