"""The loss on held-out images, under masks that are always the same."""

from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor, nn

from mae.data import Part, Reading, Source, Unreadable, read_pictures
from mae.data.randomness import derived_seed
from mae.training.parallel import Processes, plain
from mae.training.step import MaskStrategy
from mae_kernels import Masking

_MOST = 4096  # images, which stay in memory


class Validation:
    """Callable: a model in, its mean loss on the central parts of images out, alike in any number of processes.

    The result is ``{"val_loss": ...}``.

    The images are at most 4096, spread over all; they are read in the first call, each process its share. A call raises
    :class:`mae.data.Unreachable` where a part of the source cannot be had.

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
    ) -> None:
        count = min(len(source), _MOST)
        self._source = Part(source, [len(source) * i // count for i in range(count)])
        self._reading, self._strategy, self._processes = reading, strategy, processes
        self._seed, self._batch_size, self._autocast = seed, batch_size, autocast

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        with self._processes.together():
            images, numbers = self._share
        device, grid = next(model.parameters()).device, plain(model).config.grid.grid
        generator = torch.Generator().manual_seed(derived_seed("validation", self._seed, (0, 0)))
        masks = self._strategy(len(self._source), grid, generator=generator)
        was_training, losses = model.training, []
        model.eval()
        # FSDP2 gathers parameters in every forward pass, so that all processes need as many of them.
        for start in range(0, self._processes.most(len(numbers)), self._batch_size):
            chosen = slice(start, start + self._batch_size)
            count = len(numbers[chosen])
            chosen = chosen if count else slice(1)
            places = torch.tensor(numbers[chosen] or [0])
            masking = Masking(*(x[places].to(device) for x in masks))
            with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
                loss = model(images[chosen].to(device), masking=masking).loss
            losses.append(loss.float() * count)
        model.train(was_training)
        total = torch.stack(losses).double().sum().item()
        sums, counts = zip(*self._processes.gather((total, len(numbers))), strict=True)
        return {"val_loss": sum(sums) / sum(counts)}

    @cached_property
    def _share(self) -> tuple[Tensor, list[int]]:
        """Images ``[N, ...]`` uint8 of this process, and their numbers; a blank one where it has none."""
        rank, processes, count = self._processes.rank, self._processes.count, len(self._source)
        numbers = range(count * rank // processes, count * (rank + 1) // processes)  # neighbours, for a stream
        pictures = []
        if numbers:
            with suppress(Unreadable):  # others have some: that none can be read was found out before the first step
                pictures = [*read_pictures(Part(self._source, numbers), self._reading)]
        if not pictures:
            size = (self._reading.channels, *self._reading.image_size)
            return torch.zeros(1, *size, dtype=torch.uint8), []
        return torch.stack([picture for picture, _ in pictures]), [numbers[i] for _, i in pictures]
