"""The loss on held-out images, under masks that are always the same."""

import torch
from torch import Tensor, nn

from mae.data import DataError, Reading, Source, read_pictures
from mae.data.randomness import derived_seed
from mae.data.sources import Part
from mae.training.parallel import Processes, plain
from mae.training.step import MaskStrategy
from mae_kernels import Masking


class Validation:
    """Callable: a model in, its mean loss on the central parts of all images out, alike in any number of processes.

    The images are read in the first call, each process its share, and stay in memory.

    Args:
        batch_size: images of a forward pass in each process.
        autocast: to which dtype, None for none.
    """

    def __init__(
        self,
        source: Source,
        reading: Reading,
        strategy: MaskStrategy,
        processes: Processes,
        *,
        seed: int = 0,
        batch_size: int = 64,
        autocast: torch.dtype | None = None,
    ):
        self._source, self._reading, self._strategy = source, reading, strategy
        self._processes, self._seed, self._batch_size, self._autocast = processes, seed, batch_size, autocast
        self._images: Tensor | None = None
        self._numbers: list[int] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        if self._images is None:
            self._read()
        device = next(model.parameters()).device
        grid = plain(model).config.grid.grid
        mine, losses = len(self._numbers), []
        was_training = model.training
        model.eval()
        # FSDP2 gathers parameters in every forward pass, so that all processes need as many of them.
        for start in range(0, self._processes.most(mine), self._batch_size):
            rows = torch.arange(start, min(start + self._batch_size, mine))
            chosen = rows if len(rows) else torch.zeros(1, dtype=torch.int64)
            images = self._images[chosen].to(device)
            with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
                loss = model(images, masking=self._masks(grid, images, chosen)).loss
            losses.append(loss.float() * len(rows))
        model.train(was_training)
        total = torch.stack(losses).double().sum().item()
        sums, counts = zip(*self._processes.gather((total, mine)), strict=True)
        return sum(sums) / sum(counts)

    def _read(self) -> None:
        numbers = range(len(self._source))[self._processes.rank :: self._processes.count]
        numbers = numbers or range(1)  # of fewer images than processes
        try:
            pictures = [*read_pictures(Part(self._source, numbers), self._reading)]
        except DataError:  # others have some: that all are unreadable was found out before the first step
            pictures = []
        size = (self._reading.channels, *self._reading.image_size)
        blank = torch.zeros(1, *size, dtype=torch.uint8)
        self._images = torch.stack([picture for picture, _ in pictures]) if pictures else blank
        self._numbers = [numbers[i] for _, i in pictures] if self._processes.rank < len(self._source) else []

    def _masks(self, grid: tuple[int, ...], images: Tensor, chosen: Tensor) -> Masking:
        """Those of the images' places among all, whichever process has them."""
        generator = torch.Generator().manual_seed(derived_seed("held out", self._seed, (0, 0)))
        whole = self._strategy(len(self._source), grid, generator=generator)
        places = torch.tensor([self._numbers[i] if self._numbers else 0 for i in chosen.tolist()])
        return Masking(*(x[places].to(images.device) for x in whole))
