"""Batches on a device, which worker processes make."""

import warnings
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mae.data.crops import TensorImages, TrainingImages
from mae.data.errors import DataError
from mae.data.notes import Notes
from mae.data.order import Key, Order
from mae.data.workers import ignore_signals, loaded


class Batch(NamedTuple):
    """Pictures, and their numbers in the source: in place of one that cannot be read stands another, with its own."""

    images: Any  # Crops or a Tensor, on the device always a Tensor [N, C, H, W] or [N, C, T, H, W] uint8
    numbers: Tensor  # [N] int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return Batch(*(x.to(device, non_blocking=non_blocking) for x in self))


class Batches:
    """The batches of some steps, and a record of the files that could not be read, or not plainly.

    Images of a :class:`Batch` are :class:`Crops`, or, where there is no GPU to resize them, tensors that the workers
    have resized, each for itself.

    Args:
        batch_size: pictures of a step, in all processes together.
        steps: those that are wanted, counted from 0.
        rows: of each batch, those of this process.
        workers: processes; their number changes nothing about the batches.
    """

    def __init__(
        self,
        images: TrainingImages | TensorImages,
        batch_size: int,
        steps: range,
        *,
        rows: slice = slice(None),
        workers: int = 0,
    ) -> None:
        self.unreadable: dict[str, None] = {}  # problem by problem, in order, each once
        self.images = images
        source: Any = getattr(images, "source", ())
        self.notes = Notes(source)
        self.order = images.order(batch_size)
        self._steps = _Steps(images, self.order, steps, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are fewer cores, which a benchmark finds out
            self._loader = DataLoader(
                images,
                batch_sampler=self._steps,
                num_workers=workers,
                collate_fn=partial(images.collate, resize=not torch.cuda.is_available()),
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_signals,
                generator=torch.Generator(),  # the global one is left alone
            )

    def __iter__(self) -> Iterator[Batch]:
        for images, numbers, problems, notes in loaded(self._loader, "take fewer --workers, or a smaller --batch-size"):
            if images is None:
                raise DataError(problems[-1])
            self.unreadable.update(dict.fromkeys(problems))
            self.notes.add(notes)
            self.notes.warn(so_far=True)
            yield Batch(images, torch.tensor(numbers))
        if self._steps.problem is not None:
            raise self._steps.problem


class _Steps:
    """The batch sampler of a data loader; it ends before a step of which a stream cannot be read."""

    problem: DataError | None = None

    def __init__(self, images: TrainingImages | TensorImages, order: Order, steps: range, rows: slice) -> None:
        self._images, self._order, self._steps, self._rows = images, order, steps, rows

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Key]]:
        self.problem = None
        try:
            yield from self._images.with_contents(self._order.keys(step, self._rows) for step in self._steps)
        except DataError as error:  # the batches before it are on their way
            self.problem = error


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Each batch on the device. On CUDA it is copied on a stream of its own, while the step before it still runs."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:  # the host is here as soon as it has launched the step before
        with torch.cuda.stream(copying):
            batch = batch.to(device, non_blocking=True)
        training = torch.cuda.current_stream(device)
        training.wait_stream(copying)
        for x in batch:
            x.record_stream(training)  # its memory may only be used again once the step is done with it
        yield batch
