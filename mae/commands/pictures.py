"""Pictures that commands are given, their reconstructions, and the pictures and the report of a run."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mae.data import (
    DataError,
    DataWarning,
    ImageFiles,
    Joined,
    Reading,
    Source,
    is_sound,
    open_source,
    printable,
    read_pictures,
)
from mae.data.randomness import derived_seed
from mae.model import MaskedAutoencoder, Reconstruction
from mae.report.figures import View, default_count, save_reconstructions
from mae.report.page import write_report
from mae.run_files import METRICS, RECONSTRUCTIONS, picture_name
from mae.training.step import MaskStrategy
from mae_kernels import Masking


def open_images(images: Iterable[str]) -> Source:
    """Image files, which are taken whatever their suffix is, folders of them, and datasets behind hf:, as one."""

    def opened(name: str) -> Source:
        is_many = name.startswith("hf:") or Path(name).is_dir()
        if not is_many and not Path(name).exists():
            raise DataError(f"there is no file or folder {printable(name)}")
        return open_source(name) if is_many else ImageFiles([Path(name)])

    return Joined([opened(name) for name in images])


def refuse_replacing(out: Path, images: Iterable[str]) -> None:
    """Raise :class:`ValueError` where a file that is there would be replaced, and it is among the images."""
    places = [Path(name).resolve() for name in images if not name.startswith("hf:")]
    if out.is_file() and any(out.resolve().is_relative_to(place) for place in places):
        raise ValueError(f"{printable(out)} is there, among the images, and would be replaced; choose another --out")


def some_pictures(images: Iterable[str], reading: Reading, most: int) -> tuple[Source, Tensor, tuple[int, ...]]:
    """At most that many of files, folders and datasets: all of them, pictures ``[N, C, (T,) H, W]`` uint8, numbers."""
    source = open_images(images)
    pictures, numbers = zip(*read_pictures(source, reading, most), strict=True)
    return source, torch.stack(pictures), numbers


def reconstructed(model: MaskedAutoencoder, images: Tensor, strategy: MaskStrategy, seed: int) -> Reconstruction:
    """Images ``[N, C, H, W]`` or ``[N, C, T, H, W]`` under masks that are the same on every device."""
    device = model.cls_token.device
    masking = strategy(len(images), model.config.grid.grid, generator=torch.Generator().manual_seed(seed))
    return model.reconstruct(images.to(device), masking=Masking(*(x.to(device) for x in masking)))


def view_of(source: Source, numbers: Iterable[int], otherwise: View = "frames") -> View | Literal["sound"]:
    """How pictures of these numbers are drawn: sound with its axes, else as asked for."""
    return "sound" if all(is_sound(Path(source.name(i))) for i in numbers) else otherwise


class Drawing:
    """Callable: reconstructions of the same images under the same masks, as the picture of a step."""

    def __init__(self, source: Source, reading: Reading, strategy: MaskStrategy, run: Path) -> None:
        self._source, self._reading, self._strategy, self._run = source, reading, strategy, run
        self._shown: tuple[Tensor, View | Literal["sound"]] | None = None

    def __call__(self, model: MaskedAutoencoder, step: int) -> Path:
        if self._shown is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)  # training says them
                most = default_count(self._reading.image_size)
                pictures, numbers = zip(*read_pictures(self._source, self._reading, most), strict=True)
            self._shown = torch.stack(pictures), view_of(self._source, numbers)
        images, view = self._shown
        result = reconstructed(model, images, self._strategy, derived_seed("picture", 0, (0, 0)))
        return put_picture(result, self._run, step, view)

    def finish(self) -> None:
        """Write the report of what there is."""
        if (self._run / METRICS).is_file():
            write_report(self._run)


def put_picture(result: Reconstruction, run: Path, step: int, view: View | Literal["sound"] = "frames") -> Path:
    """Where the picture of a step lies then, whole."""
    file = run / RECONSTRUCTIONS / picture_name(step)
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}")
    save_reconstructions(result, beside, view=view)
    os.replace(beside, file)
    return file
