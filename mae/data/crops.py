"""One picture of training: a random box of it, cut out, and what a batch of such boxes is."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, tee
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae.data.errors import Unreachable, Unreadable
from mae.data.notes import none_readable
from mae.data.order import Key, Order, StreamOrder
from mae.data.pictures import read_image, to_tensor
from mae.data.randomness import uniform
from mae.data.readers import Reading, Wanted
from mae.data.sources import Source
from mae.data.workers import ahead
from mae_kernels import PackedImages, random_resized_crop

_MOST_TRIES = 100  # pictures, spread over all of them, before a folder is given up
_AHEAD = 2  # steps for which a stream is read before they are asked for
_ENOUGH_PIXELS = 1.5  # in each direction for each pixel of the result, which a picture keeps when it is shrunk


def random_box(height: int, width: int, draws: Sequence[float], least_area: float = 0.2) -> tuple[int, int, int, int]:
    """What ``random_crop_boxes`` makes of its 22 draws from [0, 1) for one image: top, left, height and width.

    The box has least_area to all of the area. In plain Python: forty operations on tensors of one image would take a
    third of the time that decoding it takes.
    """
    *draws, down, right = draws
    for area, ratio in zip(draws[:10], draws[10:], strict=True):
        area = height * width * (least_area + (1 - least_area) * area)
        ratio = 3 / 4 * (16 / 9) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


class Sample(NamedTuple):
    """One picture as a worker hands it on."""

    pixels: Tensor | None  # [T * C, h, w] uint8
    flip: bool
    problems: list[str]  # of the files that were passed over, or why there is no picture
    index: int = 0  # type: ignore[assignment]  # of the picture; it hides a method of tuples
    note: str = ""  # how values of more than 8 bits became these, see mae.data.levels


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
        height, width = self.image_size[-2:]
        planes = random_resized_crop(crops.images, boxes, crops.flips, (height, width))
        return arranged(planes.to(device, non_blocking=non_blocking), self.image_size)

    def _each(self, f: Callable[[Tensor], Tensor]) -> "Crops":
        return Crops(PackedImages(*map(f, self.images)), f(self.flips), self.image_size)


def arranged(planes: Tensor, image_size: tuple[int, ...]) -> Tensor:
    """``[..., C, H, W]`` or, for a size of three numbers, ``[..., C, T, H, W]`` of planes ``[..., T * C, H, W]``."""
    return planes.unflatten(-3, (*image_size[:-2], -1)).movedim(-3, -1 - len(image_size))


class Collated(NamedTuple):
    """A batch on its way from a worker."""

    images: Crops | Tensor | None  # None where no file could be read
    numbers: Sequence[int] = ()  # of these pictures in the source
    problems: Sequence[str] = ()
    notes: Sequence[tuple[int, str]] = ()


class TrainingImages(Dataset[Any]):
    """Random boxes of images, cut out and not yet resized; in place of one that cannot be read stands another.

    Frames of a clip have their box and flip in common, and a random start; of sound a random part is taken, as it is.
    Boxes that have far more pixels than the result are shrunk by a whole factor, to between 1.5 and 3 times its height
    or width, whichever is nearer: so a photograph of 12 megapixels is not handed on with 16 MB.

    Args:
        least_area: share of a picture that a box has at least; at most it has all.
        flips: whether half of the boxes are mirrored.
    """

    def __init__(
        self, source: Source, reading: Reading, seed: int = 0, *, least_area: float = 0.2, flips: bool = True
    ) -> None:
        self.source, self.reading, self.seed = source, reading, seed
        self.least_area, self.flips = least_area, flips

    def __len__(self) -> int:
        return len(self.source)

    def order(self, batch_size: int) -> Order:
        if self.source.blocks is not None:
            return StreamOrder(self.source.blocks, batch_size, self.seed)
        return Order(len(self), batch_size, self.seed)

    def with_contents(self, steps: Iterable[list[Key]]) -> Iterator[list[Key]]:
        """The same keys; those of a stream with what this process reads for its workers."""
        if self.source.blocks is None:
            yield from steps
            return
        steps, again = tee(steps)
        source: Any = self.source  # one with blocks has contents too
        contents = source.contents([key[1] for key in keys] for keys in again)
        for keys, files in ahead(zip(steps, contents, strict=True), _AHEAD):
            yield [(*key, file) for key, file in zip(keys, files, strict=True)]

    def __getitem__(self, key: Key) -> Sample:
        """The box of one picture, for key (epoch, index) or (epoch, index, the file that holds the picture).

        Source: He et al. 2021, appendix A.1; in pre-training boxes of 20 to 100 % of the area, half of them flipped.
        """
        problems = []
        epoch, index = key[:2]
        file = key[2] if len(key) == 3 else None
        start, *box, flip = uniform("sample", self.seed, (epoch, index), 24).tolist()
        wanted = Wanted(self._shrink_whole, lambda places: int(start * places))
        for other in self._others(index):
            try:
                if other == index and file is not None:
                    picture = read_image(file, self.reading, wanted)
                else:
                    picture = self.source.read(other, self.reading, wanted)
            except Unreachable as error:
                return Sample(None, False, [str(error)])
            except Unreadable as error:
                problems.append(str(error))
                continue
            if picture.is_sound:
                return Sample(to_tensor(picture), False, problems, other, picture.note)
            top, left, height, width = random_box(picture.height, picture.width, box, self.least_area)
            picture = picture.cut((left, top, left + width, top + height), self._shrink(height, width))
            return Sample(to_tensor(picture), self.flips and flip < 0.5, problems, other, picture.note)
        return Sample(None, False, [none_readable(problems, len(self.source))])

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """Samples up to the first without a picture: where one finds no file, the others need not search as well."""
        samples = []
        for key in keys:
            samples.append(self[key])
            if samples[-1].pixels is None:
                break
        return samples

    def _others(self, index: int) -> Iterator[int]:
        """The picture itself, and those that may stand in its place: of a stream first those that are read with it."""
        yield index
        beside = ()
        if self.source.blocks is not None:
            begin, count = self.source.blocks.around(index)
            beside = (begin + other for other in spread(index - begin, count))
        others = dict.fromkeys([*beside, *spread(index, len(self.source))])
        yield from islice((other for other in others if other != index), _MOST_TRIES - 1)

    def _shrink(self, height: int, width: int) -> int:
        rows, columns = self.reading.image_size[-2:]
        return max(1, int(min(height / rows, width / columns) / _ENOUGH_PIXELS))

    def _shrink_whole(self, height: int, width: int) -> int:
        """What the smallest box allows, at a ratio of 3 to 4."""
        least = math.sqrt(height * width * self.least_area * 3 / 4)
        return self._shrink(min(height, int(least)), min(width, int(least)))

    def collate(self, samples: list[Sample], *, resize: bool) -> Collated:
        """A batch of them, resized to tensors ``[N, C, H, W]`` or ``[N, C, T, H, W]`` where resize is True."""
        problems = [problem for sample in samples for problem in sample.problems]
        # None travels to the main process: an exception in a worker would arrive there buried in a traceback.
        if samples[-1].pixels is None:
            return Collated(None, problems=samples[-1].problems)
        flips = torch.tensor([sample.flip for sample in samples])
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        crops = Crops(PackedImages.pack(pixels), flips, self.reading.image_size)
        notes = [(sample.index, sample.note) for sample in samples if sample.note]
        numbers = [sample.index for sample in samples]
        return Collated(crops.to("cpu") if resize else crops, numbers, problems, notes)


class TensorImages(Dataset[Any]):
    """Images ``[N, C, H, W]`` in memory, as they are, half of them flipped. They are numbered from 0 on."""

    def __init__(self, images: Tensor, seed: int = 0) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def order(self, batch_size: int) -> Order:
        return Order(len(self), batch_size, self.seed)

    def with_contents(self, steps: Iterable[list[Key]]) -> Iterable[list[Key]]:
        return steps

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, list[int]]:
        # In NumPy: waking PyTorch's threads takes longer than copying a batch.
        numbers = [key[1] for key in keys]
        batch = self.images.numpy()[numbers]
        flips = [_flips(self.seed, key[0], len(self))[key[1]] for key in keys]
        batch[flips] = batch[flips, ..., ::-1]
        return torch.from_numpy(batch), numbers

    def collate(self, samples: tuple[Tensor, list[int]], *, resize: bool) -> Collated:
        return Collated(*samples)


@lru_cache(maxsize=2)
def _flips(seed: int, epoch: int, count: int) -> list[bool]:
    return (uniform("flip", seed, (epoch, 0), count) < 0.5).tolist()


def spread(index: int, count: int) -> Iterator[int]:
    """The index, and others far from it and from each other: broken files often lie side by side."""
    step = round(count * 0.618)  # the golden section
    while math.gcd(step, count) != 1:
        step += 1
    return ((index + i * step) % count for i in range(min(count, _MOST_TRIES)))
