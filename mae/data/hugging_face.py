"""Datasets of Hugging Face, of the hub or of this disk."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mae.data.errors import DataError, counted, printable
from mae.data.rows import Rows, Table
from mae.data.streaming import Stream, read_footers, refuse_others
from mae.reasons import reason_of

if TYPE_CHECKING:
    import datasets

_NO_SCRIPTS = 4  # the version of datasets from which on it runs none
_STREAMING = "streaming"


def open_dataset(name: str) -> Rows:
    """A dataset of the hub or of this disk: ``NAME``, ``NAME:SPLIT``, ``NAME:SPLIT:column=COLUMN:config=CONFIG``.

    NAME is that of the hub, a folder that ``save_to_disk`` or anybody else has written, or a Parquet or Arrow file. The
    split is train by default, and may be a part of it such as ``train[:1000]``. The column is the one of images, else
    of videos or sounds, else of files as bytes. No code of a dataset is ever run.

    With ``:streaming``, and without a part of a split, Parquet files are read where they lie, and nothing is copied to
    this disk: a :class:`mae.data.streaming.Stream`, whose order has few row groups in memory at a time.

    Raises:
        DataError: there is no such dataset, split or column, or several columns hold files.
    """
    where, place, options = f"hf:{name}", *_options(name, {"split", "column", "config"})
    datasets = import_datasets(where)
    if _STREAMING not in options:
        table = _opened(datasets, where, place, options)
        return _rows(datasets, table, where, options.get("column"))
    with _said(where, place):
        files, features = _files(datasets, place, options.get("split", "train"), options.get("config"))
        footers = read_footers(files)
        features = features or datasets.Features.from_arrow_schema(footers[0].metadata.schema.to_arrow_schema())
        stream = Stream(footers, _column(datasets, features, where, options.get("column")), where)
        refuse_others(footers, stream.column)
        if not len(stream):
            raise DataError(f"{printable(where)} holds no rows")
        return stream


def open_labelled_dataset(name: str) -> tuple[Table, np.ndarray, tuple[str, ...]]:
    """Such a dataset that is not streamed, the label of each row, and the names of the classes.

    Labels are of the column that ``:label=COLUMN`` names, else of the only one of type ClassLabel, else of one that is
    called label; without a ClassLabel the classes are its different values in their order.

    Raises:
        DataError: as of :func:`open_dataset`, or there is no such column, or a row without a label.
    """
    where, place, options = f"hf:{name}", *_options(name, {"split", "column", "config", "label"})
    if _STREAMING in options:
        raise DataError(f"{printable(where)}: labels are read of a dataset that is not streamed; leave :streaming out")
    datasets = import_datasets(where)
    table = _opened(datasets, where, place, options)
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    column = options.get("label") or (typed[0] if len(typed) == 1 else "label")
    if column not in table.features:
        hint = "" if "label" in options else f"; choose the one of labels with {printable(where)}:label=COLUMN"
        names = ", ".join(map(printable, table.features))
        raise DataError(f"{printable(where)} has no column {printable(column)}, but {names}{hint}")
    if not len(table):
        raise DataError(f"{printable(where)} holds no rows")
    values, feature = table.with_format(None)[column][:], table.features[column]
    is_typed = isinstance(feature, datasets.ClassLabel)
    without = sum(x is None or (is_typed and x == -1) for x in values)
    if without:
        raise DataError(f"{counted(without, 'row')} of {printable(where)} {'has' if without == 1 else 'have'} no label")
    if is_typed:
        return _rows(datasets, table, where, options.get("column")), np.array(values, np.int64), tuple(feature.names)
    classes = sorted({*values}, key=lambda x: (str(type(x)), x)) if not isinstance(values[0], (list, dict)) else []
    if not classes or isinstance(values[0], float):
        raise DataError(f"column {printable(column)} of {printable(where)} holds no labels")
    places = {value: i for i, value in enumerate(classes)}
    labels = np.array([places[value] for value in values], np.int64)
    return _rows(datasets, table, where, options.get("column")), labels, tuple(map(str, classes))


def _options(name: str, known: set[str]) -> tuple[str, dict[str, str]]:
    """The place, and what is said behind it, of these and of streaming."""
    place, *options = _parts(name)
    chosen = {}
    for x in options:
        option, equals, value = x.partition("=")
        chosen[option if equals or x == _STREAMING else "split"] = value if equals else x
    if not place:
        raise DataError(f"{printable(f'hf:{name}')} names no dataset")
    if unknown := chosen.keys() - known - {_STREAMING}:
        *first, last = sorted(known, key=["split", "column", "config", "label"].index)
        words = "".join(f"{'neither' if i == 0 else 'nor'} {x}= " for i, x in enumerate(first))
        raise DataError(f"{printable(f'hf:{name}')}: {min(unknown)}= is {words}nor {last}=")
    return place, chosen


@contextmanager
def _said(where: str, place: str) -> Iterator[None]:
    """Whatever goes wrong while a dataset is opened, in a sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of Arrow, of the hub, of the network, and of datasets itself
        script = next(iter(sorted(Path(place).glob("*.py"))), None) if Path(place).is_dir() else None
        reason = f"it holds the script {script.name}, and scripts are never run" if script else reason_of(error)
        raise DataError(f"cannot open {printable(where)}: {printable(reason)}") from error


def _opened(datasets: Any, where: str, place: str, options: dict[str, str]) -> "datasets.Dataset":
    with _said(where, place):
        return _load(datasets, place, options.get("split"), options.get("config"))


def _rows(datasets: Any, table: "datasets.Dataset", where: str, asked: str | None) -> Table:
    column = _column(datasets, table.features, where, asked)
    table = table.with_format(None).select_columns([column])
    if isinstance(feature := table.features[column], (datasets.Image, datasets.Audio, datasets.Video)):
        table = table.cast_column(column, type(feature)(decode=False))
    return Table(table, column, where)


def _parts(name: str) -> list[str]:
    """The place, which may hold colons where it is on this disk, and what follows it."""
    for ending in ("", f":{_STREAMING}"):
        if name.endswith(ending) and Path(place := name.removesuffix(ending)).exists():
            return [place, *filter(None, [ending[1:]])]
    return re.split(r":(?![^\[]*\])", name)


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
        return datasets.load_dataset(_kind(path), data_files=str(path), split=split or "train")
    if not _is_saved(path):
        _refuse_missing(place)
        return datasets.load_dataset(place, config, split=split or "train")
    saved = datasets.load_from_disk(place)
    if isinstance(saved, datasets.Dataset):
        if split is not None:
            raise DataError(f"{printable(path)} holds one dataset without splits, so none is {printable(split)}")
        return saved
    return saved[_split(split or "train", saved, place)]


def _files(datasets: Any, place: str, split: str, config: str | None) -> tuple[list[str], dict[str, Any] | None]:
    """The Parquet files of a split, as paths or URLs, and the features where something says them."""
    path = Path(place)
    if "[" in split:
        raise DataError(f"a stream is of a whole split, and {printable(split)} is a part of one")
    if _is_saved(path) or (path.is_file() and _kind(path) != "parquet"):
        raise DataError(f"{printable(path)} holds Arrow files, which are read where they lie; leave :streaming out")
    if path.is_file():
        builder = datasets.load_dataset_builder("parquet", data_files=str(path))
    else:
        _refuse_missing(place)
        builder = datasets.load_dataset_builder(place, config)
    files = builder.config.data_files or {}
    files = [str(file) for file in files[_split(split, files, place)]]
    if others := [file for file in files if not file.lower().endswith(".parquet")]:
        raise DataError(f"{printable(place)} holds {printable(others[0])}, and only Parquet is streamed")
    return files, builder.info.features


def _kind(file: Path) -> str:
    kind = file.suffix.lower().removeprefix(".")
    if kind not in ("parquet", "arrow"):
        raise DataError(f"{printable(file)} is neither a folder nor a .parquet or .arrow file")
    return kind


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written it."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _refuse_missing(place: str) -> None:
    if not Path(place).exists() and (place.count("/") > 1 or place.startswith((".", "/", "~"))):
        raise DataError(f"there is no file or folder {printable(Path(place))}")


def _split(split: str, splits: dict[str, Any], place: str) -> str:
    if split not in splits:
        names = ", ".join(map(printable, splits))
        raise DataError(f"{printable(Path(place))} holds no split {printable(split)}, but {names}")
    return split


def _column(datasets: Any, features: dict[str, Any], where: str, asked: str | None) -> str:
    """The one that was asked for, or the only one of the first kind of which there is any."""
    names = ", ".join(map(printable, features))
    if asked is not None:
        if asked not in features:
            raise DataError(f"{printable(where)} has no column {printable(asked)}, but {names}")
        is_typed = isinstance(features[asked], (datasets.Image, datasets.Audio, datasets.Video))
        if not is_typed and not _holds_bytes(features[asked]):
            raise DataError(f"column {printable(asked)} of {printable(where)} holds no files")
        return asked
    kinds = (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, datasets.Audio | datasets.Video),
        _holds_bytes,
    )
    for is_one in kinds:
        found = [name for name, feature in features.items() if is_one(feature)]
        if len(found) > 1:
            raise DataError(
                f"{printable(where)} has several columns of files: {', '.join(map(printable, found))}; choose one "
                f"with {printable(where)}:column={printable(found[0])}"
            )
        if found:
            return found[0]
    raise DataError(f"{printable(where)} has no column of images, but {names}")


def _holds_bytes(feature: Any) -> bool:
    """Whether it is a file without a type that says so, as most Parquet files that datasets did not write have it."""
    held = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(held, "dtype", "") in ("binary", "large_binary")
