"""Which pictures a step takes: a function of the seed and the step, wherever they lie."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mae.data.randomness import permutation, permutation_within
from mae.data.readers import Stored

Key = tuple[int, int] | tuple[int, int, Stored | None]  # epoch and index of a picture, and of a stream its file
_IN_MEMORY = 1 << 30  # bytes of open blocks, in all processes together


class Blocks(NamedTuple):
    """Pictures that are read together, one block after another, as the row groups of Parquet files are."""

    sizes: np.ndarray  # pictures of each, int64
    memory: np.ndarray  # bytes of each, int64

    def open_at_once(self, batch_size: int) -> int:
        """How many fit into memory, as a divisor of the batch size."""
        size = float(np.average(self.memory, weights=self.sizes)) if self.sizes.any() else 0.0  # large ones stay long
        most = min(batch_size, max(1, int(_IN_MEMORY / max(1.0, size))))
        return max(x for x in range(1, most + 1) if batch_size % x == 0)

    def around(self, index: int) -> tuple[int, int]:
        """The first picture of the block of one, and how many there are."""
        ends = np.cumsum(self.sizes)
        block = np.searchsorted(ends, index, side="right")
        return int(ends[block] - self.sizes[block]), int(self.sizes[block])


class Order:
    """Each epoch is a permutation of all pictures, and epochs follow each other without a seam."""

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._kept = lru_cache(maxsize=2)(self.epoch)

    def keys(self, step: int, rows: slice = slice(None)) -> list[Key]:
        """(epoch, index) of each picture of a step, counted from 0; of the batch only these rows."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        epochs, places = np.divmod(np.arange(places.start, places.stop), self.count)
        keys: list[Key] = []
        for epoch in dict.fromkeys(epochs.tolist()):
            order = self._kept(epoch)
            keys += [(epoch, index) for index in order[places[epochs == epoch]].tolist()]
        return keys

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of the pictures, ``[count]`` int64."""
        return permutation("order", self.seed, (epoch, 0), self.count)


class StreamOrder(Order):
    """A permutation that opens few blocks at a time, and each of them once.

    The blocks come in random order, and each is mixed within itself. They lie in lanes of equal length, as many as
    blocks are open at once; a lane fills the same rows of every batch of an epoch, so that a process, which takes some
    rows, opens few blocks that others open too.
    """

    def __init__(self, blocks: Blocks, batch_size: int, seed: int = 0) -> None:
        super().__init__(int(blocks.sizes.sum()), batch_size, seed)
        self._sizes, self.open_at_once = blocks.sizes, blocks.open_at_once(batch_size)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of the pictures, ``[count]`` int64."""
        indices, block = laid_out(permutation("order", self.seed, (epoch, 0), len(self._sizes)), self._sizes)
        lanes = self.open_at_once
        lane = np.arange(self.count) % self.batch_size * lanes // self.batch_size  # of each place in the epoch
        places = np.argsort(lane, kind="stable")
        lane = lane[places]
        # Each lane begins further within a block than the one before, or all would open their next ones together.
        lengths = np.bincount(lane, minlength=lanes)
        begins, ahead = np.cumsum(lengths) - lengths, np.arange(lanes) * self.count // (len(self._sizes) * lanes)
        turned = begins[lane] + (np.arange(self.count) - begins[lane] + ahead[lane]) % lengths[lane]
        indices, block = indices[turned], block[turned]
        piece = np.cumsum((np.diff(block, prepend=-1) != 0) | (np.diff(lane, prepend=0) != 0))
        order = np.empty_like(indices)
        order[places] = indices[permutation_within("within", self.seed, (epoch, 0), piece)]
        return order


def laid_out(blocks: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all pictures, block after block in this order of them, and the block of each; int64."""
    begins, counts = np.cumsum(sizes) - sizes, sizes[blocks]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(begins[blocks], counts) + within, np.repeat(blocks, counts)
