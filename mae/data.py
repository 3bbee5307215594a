"""Images from folders, as uint8 tensors: whatever people have in them, broken files included."""

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mae_kernels import PackedImages, random_resized_crop

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class DataError(Exception):
    """Data that cannot be trained on; the message says what was looked for and where."""


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below folder, sorted, hidden files left out."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))
    if not files:
        raise DataError(f"found no image below {folder}; looked for {', '.join(sorted(_SUFFIXES))}")
    return files


def find_labelled_images(folder: str | Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of a folder with one sub-folder per class."""
    folder = Path(folder)
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise DataError(f"{folder} must hold one sub-folder of images per class, found {len(classes)}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = find_images(folder / name)
        files += found
        labels += [label] * len(found)
    return files, labels, classes


def read_image(file: str | Path, channels: int) -> Image.Image:
    """An 8-bit picture with 1 (grey) or 3 (RGB) channels, upright, the first frame, transparency on white.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # turns few pictures, and would copy all the others
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        raise DataError(f"cannot read {file}: {error}") from error
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit pixels at 255, which turns such pictures white.
    pixels = np.asarray(image, dtype=np.float64)
    highest = 65535 if image.mode.startswith("I") else max(pixels.max(initial=0), 1)
    return Image.fromarray((pixels.clip(0, highest) * (255 / highest)).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """``[C, H, W]`` uint8."""
    pixels = np.asarray(image)
    return torch.from_numpy(np.array(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), order="C"))


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central part of the picture in the shape of size ``(H, W)``, resized to it."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """What ``random_crop_boxes`` draws for one image, 20 to 100 % of its area: top, left, height and width.

    In plain Python: forty operations on tensors of one image would take a third of the time that decoding it takes.
    """
    *draws, down, right = torch.rand(22).tolist()
    for area, ratio in zip(draws[:10], draws[10:], strict=True):
        area = height * width * (0.2 + 0.8 * area)
        ratio = 3 / 4 * (16 / 9) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


class TrainingImages(Dataset):
    """Random boxes of images, cut out and not yet resized; a file that cannot be read is replaced by the next one."""

    def __init__(self, files: list[Path], image_size: tuple[int, int], channels: int):
        self.files, self.image_size, self.channels = files, image_size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, bool, list[str]]:
        """``[C, h, w]`` uint8 or None, whether to flip it, and what went wrong with the files that were passed over.

        Source: He et al. 2021, appendix A.1; boxes of 20 to 100 % of the area, half of them flipped.
        """
        problems = []
        for offset in range(len(self.files)):
            try:
                image = read_image(self.files[(index + offset) % len(self.files)], self.channels)
            except DataError as error:
                problems.append(str(error))
                continue
            top, left, height, width = random_box(image.height, image.width)
            image = image.crop((left, top, left + width, top + height))
            return to_tensor(image), bool(torch.rand(()) < 0.5), problems
        return None, False, problems


@dataclass(frozen=True)
class Crops:
    """A batch as the workers hand it over: pictures of different sizes, on the way to being one tensor."""

    images: PackedImages
    flips: Tensor  # [N] bool
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.flips)

    def pin_memory(self) -> "Crops":
        """The same in pinned memory; the data loader calls it."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """``[N, C, H, W]`` uint8 on the device, resized and flipped there if it is a GPU with kernels for it."""
        crops = self
        if torch.device(device).type == "cuda":
            crops = self._each(lambda x: x.to(device, non_blocking=non_blocking))
        boxes = torch.cat([torch.zeros_like(crops.images.sizes), crops.images.sizes], dim=1)  # the whole of each
        return random_resized_crop(crops.images, boxes, crops.flips, self.image_size).to(
            device, non_blocking=non_blocking
        )

    def _each(self, f: Callable[[Tensor], Tensor]) -> "Crops":
        return Crops(PackedImages(*map(f, self.images)), f(self.flips), self.image_size)


class Batches:
    """A fixed number of shuffled batches, and a record of the files that could not be read.

    ``batch.to(device, non_blocking=True)`` is ``[N, C, H, W]`` uint8 there, ``len(batch)`` is N: the batches are
    :class:`Crops`, or, where there is no GPU to resize them, tensors that the workers have resized, each for itself.
    """

    def __init__(self, images: TrainingImages, *, steps: int, batch_size: int, workers: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.unreadable: dict[str, None] = {}  # problem by problem, in order, each once
        self._loader = DataLoader(
            images,
            batch_size=batch_size,
            sampler=RandomSampler(images, num_samples=steps * batch_size, generator=generator),
            num_workers=workers,
            collate_fn=partial(_collate, images.image_size, resize=not torch.cuda.is_available()),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupt,
            generator=generator,
        )

    def __iter__(self) -> Iterator[Crops | Tensor]:
        for batch, problems in self._loader:
            self.unreadable.update(dict.fromkeys(problems))
            if batch is None:
                raise DataError(f"none of the {len(self._loader.dataset)} files can be read; first: {problems[0]}")
            yield batch


def _collate(
    image_size: tuple[int, int], samples: list[tuple[Tensor | None, bool, list[str]]], *, resize: bool
) -> tuple[Crops | Tensor | None, list[str]]:
    images, flips, problems = zip(*samples, strict=True)
    problems = [problem for each in problems for problem in each]
    # None travels to the main process: an exception in a worker would arrive there buried in a traceback.
    if any(image is None for image in images):
        return None, problems
    crops = Crops(PackedImages.pack(images), torch.tensor(flips), image_size)
    return crops.to("cpu") if resize else crops, problems


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the workers too; the main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def on_device(batches: Iterable, device: torch.device) -> Iterator[Tensor]:
    """Each batch on the device. On CUDA it is copied on a stream of its own, while the step before it still runs."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:  # the host is here as soon as it has launched the step before
        with torch.cuda.stream(copying):
            images = batch.to(device, non_blocking=True)
        training = torch.cuda.current_stream(device)
        training.wait_stream(copying)
        images.record_stream(training)  # its memory may only be used again once the step is done with it
        yield images
