"""Batches on a device: which pictures each holds, and worker processes that make them."""

import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mae.data.crops import Crops, TensorImages, TrainingImages
from mae.data.errors import DataError
from mae.data.notes import Notes, none_readable
from mae.data.randomness import permutation
from mae.data.workers import ignore_signals, loaded


class Order(NamedTuple):
    """Which pictures a step takes: each epoch is a permutation of all, and epochs follow each other without a seam."""

    count: int
    batch_size: int
    seed: int = 0

    def keys(self, step: int, rows: slice = slice(None)) -> list[tuple[int, int]]:
        """(epoch, index) of each picture of a step, counted from 0; of the batch only these rows."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        epochs, places = np.divmod(np.arange(places.start, places.stop), self.count)
        keys: list[tuple[int, int]] = []
        for epoch in dict.fromkeys(epochs.tolist()):
            order = _permutation(self.seed, epoch, self.count)
            keys += [(epoch, index) for index in order[places[epochs == epoch]].tolist()]
        return keys


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int):
    return permutation("order", seed, (epoch, 0), count)


class Batches:
    """The batches of some steps, and a record of the files that could not be read, or not plainly.

    ``batch.to(device, non_blocking=True)`` is ``[N, C, H, W]`` or ``[N, C, T, H, W]`` uint8 there, ``len(batch)`` is N:
    the batches are :class:`Crops`, or, where there is no GPU to resize them, tensors that the workers have resized,
    each for itself.

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
    ):
        self.unreadable: dict[str, None] = {}  # problem by problem, in order, each once
        self.images = images
        self.notes = Notes(getattr(images, "source", ()))
        self.order = Order(len(images), batch_size, images.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are fewer cores, which a benchmark finds out
            self._loader = DataLoader(
                images,
                batch_sampler=_Steps(self.order, steps, rows),
                num_workers=workers,
                collate_fn=partial(images.collate, resize=not torch.cuda.is_available()),
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_signals,
                generator=torch.Generator(),  # the global one is left alone
            )

    def __iter__(self) -> Iterator[Crops | Tensor]:
        for batch, problems, notes in loaded(self._loader, "take fewer --workers, or a smaller --batch-size"):
            self.unreadable.update(dict.fromkeys(problems))
            if batch is None:
                raise DataError(none_readable(problems, self.order.count))
            self.notes.add(notes)
            self.notes.warn(so_far=True)
            yield batch


class _Steps:
    """The batch sampler of a data loader."""

    def __init__(self, order: Order, steps: range, rows: slice):
        self._order, self._steps, self._rows = order, steps, rows

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self._order.keys(step, self._rows) for step in self._steps)


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
