"""Images from folders, as uint8 tensors: whatever people have in them, broken files included."""

import math
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

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
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        raise DataError(f"cannot read {file}: {error}") from error
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit pixels at 255, which turns such pictures white.
    pixels = np.asarray(image, dtype=np.float64)
    highest = 65535 if image.mode.startswith("I") else max(pixels.max(initial=0), 1)
    return Image.fromarray((pixels.clip(0, highest) * (255 / highest)).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """``[C, H, W]`` uint8."""
    pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central part of the picture in the shape of size ``(H, W)``, resized to it."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def random_resized_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The published augmentation: 20 to 100 % of the area, aspect ratio 3/4 to 4/3, resized, half of them flipped.

    Source: He et al. 2021, appendix A.1.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * torch.empty(()).uniform_(0.2, 1).item()
        ratio = math.exp(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = torch.randint(width - w + 1, ()).item()
            top = torch.randint(height - h + 1, ()).item()
            image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
            break
    else:
        image = resize_and_crop(image, size)
    return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


class TrainingImages(Dataset):
    """Randomly cropped images; a file that cannot be read is replaced by the next one that can."""

    def __init__(self, files: list[Path], image_size: tuple[int, int], channels: int):
        self.files, self.image_size, self.channels = files, image_size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[str]]:
        """``[C, H, W]`` uint8 or None, and what went wrong with the files that were passed over."""
        problems = []
        for offset in range(len(self.files)):
            try:
                image = read_image(self.files[(index + offset) % len(self.files)], self.channels)
            except DataError as error:
                problems.append(str(error))
                continue
            return to_tensor(random_resized_crop(image, self.image_size)), problems
        return None, problems


class Batches:
    """A fixed number of shuffled batches ``[N, C, H, W]`` uint8, and a record of the files that could not be read."""

    def __init__(self, images: TrainingImages, *, steps: int, batch_size: int, workers: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.unreadable: dict[str, None] = {}  # problem by problem, in order, each once
        self._loader = DataLoader(
            images,
            batch_size=batch_size,
            sampler=RandomSampler(images, num_samples=steps * batch_size, generator=generator),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupt,
            generator=generator,
        )

    def __iter__(self) -> Iterator[Tensor]:
        for images, problems in self._loader:
            self.unreadable.update(dict.fromkeys(problems))
            if images is None:
                raise DataError(f"none of the {len(self._loader.dataset)} files can be read; first: {problems[0]}")
            yield images


def _collate(samples: list[tuple[Tensor | None, list[str]]]) -> tuple[Tensor | None, list[str]]:
    images, problems = zip(*samples, strict=True)
    # None travels to the main process: an exception in a worker would arrive there buried in a traceback.
    stacked = None if any(image is None for image in images) else torch.stack(images)
    return stacked, [problem for each in problems for problem in each]


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
