"""Training with labels: the whole encoder is fine-tuned, or a linear layer on the frozen one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mae.data import Batch
from mae.data.randomness import derived_seed
from mae.fields import SHARE, check, is_number
from mae.model import Classifier
from mae.training.augmentation import draw_erasing, draw_mix, mix_images, mixed_targets
from mae.training.optimizers import lars, layerwise_adamw, sgd
from mae.training.parallel import Processes
from mae.training.recipe import RunConfig

_EPS = 1e-6  # of the normalisation of a probe's features, as published
_NOT_NEGATIVE = (lambda x: is_number(x) and x >= 0, "a number from 0 on")
_PART = (lambda x: is_number(x, 0) and x <= 1, "a number above 0, at most 1")
_RULES = {
    "least_area": _PART, "layer_decay": _PART, "drop_path": SHARE, "smoothing": SHARE, "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE, "erase": (lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "ema_decay": (lambda x: x is None or SHARE[0](x), SHARE[1]),
}  # fmt: skip


@dataclass(frozen=True)
class LabelledConfig(RunConfig):
    """What training with labels has beside that of every run."""

    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    flips: bool = True
    """Mirror half of the images (hflip 0.5); not where left and right mean something, as in digits and letters."""
    least_area: float = 0.08
    """The smallest random crop, as a share of the picture's area (scale[0] of RandomResizedCrop), published: 0.08; with
    1 only its shape varies. Where objects fill small pictures, 0.5 or more."""

    # Of a task on this; a subclass that can be told otherwise has fields of these names.
    smoothing: ClassVar[float] = 0.0
    mixup: ClassVar[float] = 0.0
    cutmix: ClassVar[float] = 0.0
    erase: ClassVar[float] = 0.0
    ema_decay: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(vars(self), _RULES)


@dataclass(frozen=True)
class FinetuneTraining(LabelledConfig):
    """The published recipe of fine-tuning, appendix A.1 of He et al. 2021, table 9, without RandAugment."""

    epochs: float | None = None
    """Passes over all images; 100 where steps are not given either. Published: 100, 50 for larger ViTs than ViT-B."""
    base_lr: float = 5e-4
    """Peak learning rate per 256 images: the rate is base_lr * batch_size / 256. Published: 5e-4 in batches of 1024."""
    layer_decay: float = 0.65
    """Learning rate of a block as a share of that of the block behind it. Published: 0.65, larger ViTs 0.75."""
    drop_path: float = 0.1
    """Stochastic depth: share of images for which the last block is passed over, less for those before, in equal steps.
    Published: 0.1, ViT-L 0.2."""
    smoothing: float = 0.1  # type: ignore[misc]  # a field here
    """Label smoothing: share of the target that is spread over all classes."""
    mixup: float = 0.8  # type: ignore[misc]  # a field here
    """Parameter of the Beta distribution of mixup; 0 for none."""
    cutmix: float = 1.0  # type: ignore[misc]  # a field here
    """The same of cutmix. With both, each has half of the steps."""
    erase: float = 0.0  # type: ignore[misc]  # a field here
    """Random erasing (reprob): share of images of which a box gets a random colour; the published code has 0.25."""
    ema_decay: float | None = None  # type: ignore[misc]  # a field here
    """Decay of averaged weights, such as 0.9999, which are then those that are tested and saved."""

    usual: ClassVar[dict[str, float]] = {"epochs": 100}


@dataclass(frozen=True)
class ProbeTraining(LabelledConfig):
    """The published recipe of linear probing, appendix A.1 of He et al. 2021, table 10."""

    epochs: float | None = None
    """Passes over all images; 90 where steps are not given either, as published."""
    batch_size: int = 256
    """Images per step, in all processes together. Published: 16384."""
    base_lr: float = 0.1
    """Peak learning rate per 256 images: the rate is base_lr * batch_size / 256."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly; then it falls as a half cosine."""
    weight_decay: float = 0.0
    """Weight decay."""
    micro_batches: int = 1
    """Parts in which a process computes its share of a batch, to fit into memory; features are normalised over a part
    of it in all processes."""

    usual: ClassVar[dict[str, float]] = {"epochs": 90}


class Classification:
    """A task of :func:`mae.training.loop.train`: cross entropy of labels, for a :class:`Classifier`.

    Args:
        labels: ``[images]`` int64, by the numbers of the images in their source.
        make_optimizer: of the model and the learning rate.

    Raises:
        ValueError: pairs are mixed, and a process has no even number of images.
    """

    def __init__(
        self,
        model: Classifier,
        config: LabelledConfig,
        labels: Tensor,
        make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer],
        processes: Processes = Processes(),
    ) -> None:
        if (config.mixup or config.cutmix) and config.batch_size % (2 * processes.count):
            raise ValueError(
                f"mixup and cutmix take images in pairs, and batch_size {config.batch_size} is no multiple of "
                f"{2 * processes.count}"
            )
        self._model, self._config, self._labels, self._processes = model, config, labels, processes
        self._classes = len(model.head_config.classes)
        self.optimizer, self.ema_decay = make_optimizer, config.ema_decay

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        images, config = batch.images, self._config
        device, size, rows = images.device, tuple(images.shape[-2:]), self._processes.rows(config.batch_size)
        self._labels = self._labels.to(device)
        if config.erase:
            whole = draw_erasing(config.seed, step, config.erase, config.batch_size, images.shape[1], size)
            images = type(whole)(*(x[rows] for x in whole))(images)
        mix = draw_mix(config.seed, step, config.mixup, config.cutmix, size)
        if mix.share < 1 and mix.box is None:
            images = self._model.patch_embed.floating_pixels(images)
        images = images if mix.share == 1 else mix_images(images, mix)
        targets = mixed_targets(self._labels[batch.numbers], self._classes, config.smoothing, mix)
        if not self._model.drop_path:
            return images, targets
        generator = torch.Generator(device).manual_seed(derived_seed("drop path", config.seed, (step, 0)))
        return images, targets, self._model.draw_keep(config.batch_size, generator)[rows]

    @staticmethod
    def loss(model: nn.Module, images: Tensor, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        return F.cross_entropy(model(images, keep).float(), targets)

    def exported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return folded(state) if "head.0.running_mean" in state else state  # of a process that does not lead it is empty


def finetuning(
    model: Classifier, config: FinetuneTraining, labels: Tensor, processes: Processes = Processes()
) -> Classification:
    def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return layerwise_adamw(model, lr, config.weight_decay, config.layer_decay)

    return Classification(model, config, labels, make_optimizer, processes)


def probing(
    model: Classifier,
    config: ProbeTraining,
    labels: Tensor,
    processes: Processes = Processes(),
    solver: Literal["sgd", "lars"] = "sgd",
) -> Classification:
    """Freezes the encoder, and puts a normalisation of its features before the linear layer, as published.

    Raises:
        ValueError: batches of one image, whose normalised features are all 0, or a model that is to be sharded.
    """
    if config.parallel == "fsdp":
        raise ValueError("parallel fsdp shards what is trained, and a probe trains one layer; leave it out")
    if (size := config.batch_size // config.micro_batches) < 2:
        raise ValueError(f"a probe normalises features over the batch, so batch_size must be 2 at least, got {size}")
    model.requires_grad_(False)
    model.head = nn.Sequential(BatchNorm(model.head.in_features, affine=False, eps=_EPS), model.head)
    model.head.requires_grad_(True)
    nn.init.trunc_normal_(model.head[1].weight, std=0.01)

    def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return (lars if solver == "lars" else sgd)(model, lr, config.weight_decay)

    return Classification(model, config, labels, make_optimizer, processes)


class BatchNorm(nn.BatchNorm1d):
    """Of features that need no gradient, in float32, over the batch of all processes.

    The first running statistics are those of the first batches alone, as their mean: features of a masked autoencoder
    vary so little that PyTorch's initial variance of 1 would outweigh theirs for a hundred steps. Batches that are not
    finite leave them as they are, as they leave the weights.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.num_batches_tracked = self.num_batches_tracked.float()  # a checkpoint's averages are of floats

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if not self.training:
            return super().forward(x)
        count = len(x) * (dist.get_world_size() if dist.is_initialized() else 1)
        mean = _summed(x.sum(0)) / count
        variance = _summed((x - mean).square().sum(0)) / count
        with torch.no_grad():
            is_finite = mean.isfinite().all() & variance.isfinite().all()
            self.num_batches_tracked += is_finite
            weight = (1 / self.num_batches_tracked.clamp(min=1)).clamp(min=self.momentum)
            for running, new in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                running.lerp_(torch.where(is_finite, new, running), weight)
        return (x - mean) * (variance + self.eps).rsqrt()


def _summed(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the normalisation in ``head.0`` as a part of the linear layer behind it, ``head``."""
    mean, variance, weight, bias = (
        state[f"head.{name}"] for name in ("0.running_mean", "0.running_var", "1.weight", "1.bias")
    )
    weight = weight * (variance + _EPS).rsqrt()
    rest = {name: x for name, x in state.items() if not name.startswith("head.")}
    return rest | {"head.weight": weight, "head.bias": bias - weight @ mean}
