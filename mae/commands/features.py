"""``python -m mae features``."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.lib import format as npy
from torch import Tensor

from mae.checkpoints.saving import write_files
from mae.commands.options import LoadOptions, ReadingOptions
from mae.commands.pictures import open_images, refuse_replacing
from mae.data import Source, counted, printable, usable_workers, whole_batches
from mae.data.whole import refuse_unreadable
from mae.evaluation.features import FeatureKind, features_of
from mae.fields import COUNT, WORKERS, check
from mae.training.loop import choose_device

_SUFFIXES = (".npy", ".parquet")


@dataclass(frozen=True)
class FeaturesConfig:
    """Write the features of images, one row for each, in an array that other programs read."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads."""
    images: tuple[str, ...]
    """Image files, folders of them, or hf: and a dataset."""
    out: Path = Path("features.npy")
    """An .npy of float32, beside it a .txt of that name whose lines are the files of its rows; or a .parquet of the
    columns file and features."""
    kind: FeatureKind = "mean"
    """mean of the patch tokens or class token, [images, D]; patches: all patch tokens, [images, patches, D]."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 2
    """Processes that decode images."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def features(config: FeaturesConfig) -> None:
    check(vars(config), {"batch_size": COUNT, "workers": WORKERS})
    config.reading.reading()
    if config.out.suffix not in _SUFFIXES:
        raise ValueError(f"{config.out} must end in {' or '.join(_SUFFIXES)}")
    if config.out.is_dir():
        raise ValueError(f"{config.out} is a folder, not a file to write")
    refuse_replacing(config.out, config.images)
    if config.out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError("a .parquet needs the package pyarrow: pip install 'mae_kernels[datasets]'")
    model = config.loading.load(config.checkpoint).to(choose_device(config.device))
    source, reading, names = open_images(config.images), config.reading.reading(model.config), []
    refuse_unreadable(source, reading)

    def rows() -> Iterator[Tensor]:
        workers = usable_workers(config.workers)
        for images, numbers in whole_batches(source, reading, config.batch_size, workers=workers):
            names.extend(_name(source, number) for number in numbers.tolist())
            yield features_of(model, images, config.kind).cpu()

    if config.out.suffix == ".npy":
        beside = config.out.with_suffix(".txt")
        writers = {
            config.out.name: lambda path: _write_npy(path, rows()),
            beside.name: lambda path: path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8"),
        }
    else:
        writers = {config.out.name: lambda path: _write_parquet(path, rows(), names)}
    write_files(config.out.parent, writers)
    also = f", and the names of their files to {printable(beside)}" if config.out.suffix == ".npy" else ""
    print(f"Wrote the features of {counted(len(names), 'image')} to {printable(config.out)}{also}")


def _name(source: Source, number: int) -> str:
    """In one line, whatever the name holds."""
    return printable(source.name(number))


def _write_npy(path: Path, batches: Iterator[Tensor]) -> None:
    """Batch by batch, so that no array of all has to fit into memory."""
    kind, count = npy.dtype_to_descr(np.dtype(np.float32)), 0
    with path.open("wb") as file:
        for batch in batches:
            header = {"descr": kind, "fortran_order": False, "shape": (count + len(batch), *batch.shape[1:])}
            file.seek(0)
            npy.write_array_header_1_0(file, header)  # as long for any number of rows
            file.seek(0, os.SEEK_END)
            file.write(batch.numpy().tobytes())
            count += len(batch)


def _write_parquet(path: Path, batches: Iterator[Tensor], names: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    count = 0
    for batch in batches:
        kind = pa.float32()
        for length in reversed(batch.shape[1:]):
            kind = pa.list_(kind, length)
        values = pa.array(batch.flatten().numpy())
        for length in reversed(batch.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, length)
        files = pa.array(names[count : count + len(batch)], pa.string())
        table = pa.table({"file": files, "features": values.cast(kind)})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        count += len(batch)
    writer.close()
