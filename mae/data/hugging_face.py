"""Datasets of Hugging Face, of the hub or of this disk."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae.data.errors import DataError, printable
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
    where = f"hf:{name}"
    place, *options = _parts(name)
    streams = _STREAMING in options
    chosen = dict(x.split("=", 1) if "=" in x else ("split", x) for x in options if x != _STREAMING)
    if not place:
        raise DataError(f"{printable(where)} names no dataset")
    if unknown := chosen.keys() - {"split", "column", "config"}:
        raise DataError(f"{printable(where)}: {min(unknown)}= is neither split= nor column= nor config=")
    datasets = import_datasets(where)
    split, config, asked = (chosen.get(name) for name in ("split", "config", "column"))
    try:
        if streams:
            files, features = _files(datasets, place, split or "train", config)
            footers = read_footers(files)
            features = features or datasets.Features.from_arrow_schema(footers[0].metadata.schema.to_arrow_schema())
            stream = Stream(footers, _column(datasets, features, where, asked), where)
            refuse_others(footers, stream.column)
            if not len(stream):
                raise DataError(f"{printable(where)} holds no rows")
            return stream
        table = _load(datasets, place, split, config)
    except DataError:
        raise
    except Exception as error:  # of Arrow, of the hub, of the network, and of datasets itself
        script = next(iter(sorted(Path(place).glob("*.py"))), None) if Path(place).is_dir() else None
        reason = f"it holds the script {script.name}, and scripts are never run" if script else reason_of(error)
        raise DataError(f"cannot open {printable(where)}: {printable(reason)}") from error
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
