"""``python -m mae pack``."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mae.commands.options import ReadingOptions
from mae.data import (
    DataWarning,
    ImageFiles,
    Reading,
    counted,
    find_labelled_images,
    open_source,
    printable,
    usable_workers,
)
from mae.data.pack import Packing, pack, refuse_filled
from mae.data.whole import refuse_unreadable
from mae.fields import check, is_whole

_SIDE = (lambda x: is_whole(x, 16, 4096), "a whole number of 16 to 4096")
_QUALITY = (lambda x: is_whole(x, 1, 100), "a whole number of 1 to 100")
_WORKERS = (lambda x: is_whole(x, 0, 10**9), "a whole number from 0 on")


@dataclass(frozen=True)
class PackConfig:
    """Write images, made small, as a dataset that --data hf:OUT and datasets.load_dataset read."""

    data: str
    """Folder of images, searched with its sub-folders, or hf: and a dataset."""
    out: Path
    """Folder to write, which is there when all of it is written."""
    overwrite: bool = False
    """Replace the dataset that the folder holds."""
    labels: bool = False
    """Write the sub-folders as classes too, one for each image."""
    in_chans: Literal[1, 3] = 3
    """Channels that are stored."""
    workers: int = 2
    """Processes that decode, resize and encode."""
    packing: Annotated[Packing, tyro.conf.arg(name="")] = field(default_factory=Packing)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def run_pack(config: PackConfig) -> None:
    check(vars(config) | vars(config.packing), {"short_side": _SIDE, "quality": _QUALITY, "workers": _WORKERS})
    reading = Reading(config.in_chans, **vars(config.reading))
    refuse_filled(config.out, config.overwrite)
    if config.labels:
        files, numbers, names = find_labelled_images(config.data)
        source, labels = ImageFiles(files, Path(config.data)), (numbers, names)
    else:
        source, labels = open_source(config.data), None
    refuse_unreadable(source, reading)
    packed = pack(
        source,
        config.out,
        config.packing,
        reading,
        labels=labels,
        workers=usable_workers(config.workers),
        overwrite=config.overwrite,
    )
    if packed.problems:
        warnings.warn(
            f"{len(packed.problems)} of {len(source)} files cannot be read; first: {packed.problems[0]}",
            DataWarning,
            stacklevel=2,
        )
    images, files, out = counted(packed.images, "image"), counted(packed.files, "file"), printable(config.out)
    size = f"{packed.size / 1e9:.2f} GB" if packed.size >= 1e9 else f"{packed.size / 1e6:.1f} MB"
    classes = f", {counted(len(labels[1]), 'class', 'classes')}" if labels else ""
    print(f"Packed {images}{classes} into {files} of {size} in all, in {out}. Train on them:")
    print(f"  python -m mae pretrain --data hf:{out} --recipe {'small_data' if torch.cuda.is_available() else 'cpu'}")
