"""Images and clips in shuffled batches on a device: cut out, shrunk and packed by worker processes."""

import math
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mae.data.errors import DataError, DataWarning, counted, printable
from mae.data.levels import ENOUGH, FEW_LEVELS, OWN_RANGE
from mae.data.pictures import read_image, resize_and_crop, to_tensor
from mae.data.readers import Reading, Wanted
from mae_kernels import PackedImages, random_resized_crop

_MOST_TRIES = 100  # files, spread over all of them, before a folder is given up
_ENOUGH_PIXELS = 1.5  # in each direction for each pixel of the result, which a picture keeps when it is shrunk

_NOTES = {
    OWN_RANGE: "scaled each by its own range of values, such as {}; --value-range LOW HIGH gives all the same scale",
    FEW_LEVELS: f"left by --value-range with fewer than {ENOUGH} levels of 256, such as {{}}",
}


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


class Sample(NamedTuple):
    """One picture as a worker hands it on."""

    pixels: Tensor | None  # [T * C, h, w] uint8; None where no file could be read
    flip: bool
    problems: list[str]  # of the files that were passed over
    index: int = 0  # of the file
    note: str = ""  # how values of more than 8 bits became these, see mae.data.levels


class TrainingImages(Dataset):
    """Random boxes of images, cut out and not yet resized; in place of a file that cannot be read stands another one.

    Frames of a clip have their box and flip in common, and a random start; of sound a random part is taken, as it is.
    Boxes that have far more pixels than the result are shrunk by a whole factor, to between 1.5 and 3 times its height
    or width, whichever is nearer: so a photograph of 12 megapixels is not handed on with 16 MB.
    """

    def __init__(self, files: list[Path], reading: Reading):
        self.files, self.reading = files, reading

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """The box of one picture.

        Source: He et al. 2021, appendix A.1; boxes of 20 to 100 % of the area, half of them flipped.
        """
        problems = []
        for other in _spread(index, len(self.files)):
            try:
                picture = read_image(self.files[other], self.reading, Wanted(self._shrink_whole, _random_place))
            except DataError as error:
                problems.append(str(error))
                continue
            if picture.is_sound:
                return Sample(to_tensor(picture), False, problems, other, picture.note)
            top, left, height, width = random_box(picture.height, picture.width)
            picture = picture.cut((left, top, left + width, top + height), self._shrink(height, width))
            return Sample(to_tensor(picture), bool(torch.rand(()) < 0.5), problems, other, picture.note)
        return Sample(None, False, problems)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Samples up to the first without a picture: where one finds no file, the others need not search as well."""
        samples = []
        for index in indices:
            samples.append(self[index])
            if samples[-1].pixels is None:
                break
        return samples

    def _shrink(self, height: int, width: int) -> int:
        rows, columns = self.reading.image_size[-2:]
        return max(1, int(min(height / rows, width / columns) / _ENOUGH_PIXELS))

    def _shrink_whole(self, height: int, width: int) -> int:
        """What the smallest box allows, a fifth of the area at a ratio of 3 to 4."""
        least = math.sqrt(height * width * 0.2 * 3 / 4)
        return self._shrink(min(height, int(least)), min(width, int(least)))


def _random_place(places: int) -> int:
    return int(torch.randint(places, ()))


def _spread(index: int, count: int) -> Iterator[int]:
    """The index, and others far from it and from each other: broken files often lie side by side."""
    step = round(count * 0.618)  # the golden section
    while math.gcd(step, count) != 1:
        step += 1
    return ((index + i * step) % count for i in range(min(count, _MOST_TRIES)))


@dataclass(frozen=True)
class Crops:
    """A batch as the workers hand it over: pictures of different sizes, on the way to being one tensor."""

    images: PackedImages
    flips: Tensor  # [N] bool
    image_size: tuple[int, ...]  # (H, W) or (T, H, W)

    def __len__(self) -> int:
        return len(self.flips)

    def pin_memory(self) -> "Crops":
        """The same in pinned memory; the data loader calls it."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """``[N, C, H, W]`` or ``[N, C, T, H, W]`` uint8 on the device, resized there if it is a GPU with kernels."""
        crops = self
        if torch.device(device).type == "cuda":
            crops = self._each(lambda x: x.to(device, non_blocking=non_blocking))
        boxes = torch.cat([torch.zeros_like(crops.images.sizes), crops.images.sizes], dim=1)  # the whole of each
        planes = random_resized_crop(crops.images, boxes, crops.flips, self.image_size[-2:])
        return _arranged(planes.to(device, non_blocking=non_blocking), self.image_size)

    def _each(self, f: Callable[[Tensor], Tensor]) -> "Crops":
        return Crops(PackedImages(*map(f, self.images)), f(self.flips), self.image_size)


def _arranged(planes: Tensor, image_size: tuple[int, ...]) -> Tensor:
    """``[..., C, H, W]`` or, for a size of three numbers, ``[..., C, T, H, W]`` of planes ``[..., T * C, H, W]``."""
    return planes.unflatten(-3, (*image_size[:-2], -1)).movedim(-3, -1 - len(image_size))


class Batches:
    """A fixed number of shuffled batches, and a record of the files that could not be read, or not plainly.

    ``batch.to(device, non_blocking=True)`` is ``[N, C, H, W]`` or ``[N, C, T, H, W]`` uint8 there, ``len(batch)`` is N:
    the batches are :class:`Crops`, or, where there is no GPU to resize them, tensors that the workers have resized,
    each for itself.
    """

    def __init__(self, images: TrainingImages, *, steps: int, batch_size: int, workers: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.unreadable: dict[str, None] = {}  # problem by problem, in order, each once
        self.notes = Notes(images.files)
        self._loader = DataLoader(
            images,
            batch_size=batch_size,
            sampler=RandomSampler(images, num_samples=steps * batch_size, generator=generator),
            num_workers=workers,
            collate_fn=partial(_collate, images.reading.image_size, resize=not torch.cuda.is_available()),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupt,
            generator=generator,
        )

    def __iter__(self) -> Iterator[Crops | Tensor]:
        for batch, problems, notes in self._loader:
            self.unreadable.update(dict.fromkeys(problems))
            if batch is None:
                raise DataError(_none_readable(problems, len(self._loader.dataset)))
            self.notes.add(notes)
            self.notes.warn(so_far=True)
            yield batch


class Notes:
    """Counts the pictures whose values were not plainly taken, each file once."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._noted: dict[str, set[int]] = {note: set() for note in _NOTES}
        self._told = dict.fromkeys(_NOTES, 0)

    def add(self, notes: Iterable[tuple[int, str]]) -> None:
        """Positions of files, and what became of their values."""
        for index, note in notes:
            self._noted[note].add(index)

    def warn(self, so_far: bool = False) -> None:
        """A :class:`DataWarning` for each kind of which there are more than it said last; so_far only for new kinds."""
        for note, indices in self._noted.items():
            if len(indices) > self._told[note] and not (so_far and self._told[note]):
                self._told[note] = len(indices)
                count = counted(len(indices), "picture") + (" so far" if so_far else "")
                what = _NOTES[note].format(printable(self._files[min(indices)]))
                warnings.warn(f"{count} {what}", DataWarning, stacklevel=3)


def _none_readable(problems: list[str], count: int) -> str:
    tried = f"the {count} files" if len(problems) >= count else f"{len(problems)} files, spread over all {count},"
    return f"none of {tried} can be read; first: {problems[0]}"


def _collate(
    image_size: tuple[int, ...], samples: list[Sample], *, resize: bool
) -> tuple[Crops | Tensor | None, list[str], list[tuple[int, str]]]:
    problems = [problem for sample in samples for problem in sample.problems]
    # None travels to the main process: an exception in a worker would arrive there buried in a traceback.
    if samples[-1].pixels is None:
        return None, samples[-1].problems, []
    flips = torch.tensor([sample.flip for sample in samples])
    crops = Crops(PackedImages.pack([sample.pixels for sample in samples]), flips, image_size)
    notes = [(sample.index, sample.note) for sample in samples if sample.note]
    return crops.to("cpu") if resize else crops, problems, notes


def read_pictures(files: list[Path], reading: Reading, most: int | None = None) -> Iterator[tuple[Tensor, int]]:
    """The central part of each picture, ``[C, H, W]`` or ``[C, T, H, W]`` uint8, and its position in files.

    With most they are at most that many, spread over all files: the first readable one of each of as many equal parts,
    and for a part without any a further one of another part. Files that cannot be read are passed over; in the end a
    :class:`DataWarning` counts them.

    Raises:
        DataError: none of the files can be read.
    """
    most = len(files) if most is None else most
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    borders = [len(files) * i // min(most, len(files)) for i in range(min(most, len(files)) + 1)]
    parts = [iter(range(*ends)) for ends in pairwise(borders)]
    _refuse_unreadable(files, reading)
    problems, notes, taken, tried = [], Notes(files), 0, 0
    for part in (*parts, rest := chain(*parts)):
        for index in part:
            if taken == most:
                break
            tried += 1
            try:
                picture = read_image(files[index], reading)
            except DataError as error:
                problems.append(str(error))
                continue
            if picture.note:
                notes.add([(index, picture.note)])
            taken += 1
            planes = to_tensor(resize_and_crop(picture, reading.image_size[-2:]))
            yield _arranged(planes, reading.image_size), index
            if part is not rest:
                break
    notes.warn()
    if problems:
        warnings.warn(
            f"{len(problems)} of {tried} files cannot be read; first: {problems[0]}", DataWarning, stacklevel=2
        )


def _refuse_unreadable(files: list[Path], reading: Reading) -> None:
    """At once, and not when the last of many files has been tried."""
    problems = []
    for index in _spread(0, len(files)):
        try:
            read_image(files[index], reading)
            return
        except DataError as error:
            problems.append(str(error))
    raise DataError(_none_readable(problems, len(files)))


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
