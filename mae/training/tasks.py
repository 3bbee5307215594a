"""What a run trains: everything that the loop does not do alike for all of them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from mae.data import Batch
from mae.data.randomness import derived_seed
from mae.training.optimizers import OPTIMIZERS
from mae.training.parallel import Processes
from mae.training.recipe import TrainConfig
from mae.training.step import pretraining_loss
from mae_kernels.patch_grid import PatchGrid, Sizes


class Task(Protocol):
    """The model is distributed where there are several processes; tensors are on its device."""

    ema_decay: float | None  # of the averaged weights that the run leaves in place of the trained ones

    @property
    def loss(self) -> Callable[..., Tensor]:
        """Of the model and what inputs gives, a mean over the batch."""

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """A group with an ``lr_scale`` gets that share of the learning rate of each step."""

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        """What the loss takes of this process's rows; whatever is random in it is drawn for the batch of all."""

    def exported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the model as everyone else takes them."""


class Pretraining:
    """Masks, and the squared error of what they hide."""

    loss = staticmethod(pretraining_loss)
    ema_decay: float | None = None

    def __init__(self, config: TrainConfig, patch_size: Sizes, processes: Processes = Processes()) -> None:
        self._config, self._patch_size, self._processes = config, patch_size, processes

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return OPTIMIZERS[self._config.optimizer](model, lr, self._config.weight_decay)

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        images, config = batch.images, self._config
        generator = torch.Generator(images.device).manual_seed(derived_seed("mask", config.seed, (step, 0)))
        grid = PatchGrid.of("Pretraining", images, self._patch_size).grid
        whole = config.strategy(config.batch_size, grid, generator=generator, device=images.device)
        rows = self._processes.rows(config.batch_size)
        return images, *(x[rows] for x in whole)

    def exported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
